"""The start and the end of a training of several processes: who they are, by config or environment;
how each one leaves.
"""

import contextlib
import math
import os
import pathlib
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import NamedTuple

from llama_jax.cli.main import run_program
from llama_jax.errors import InputError
from llama_jax.parallel.hosts import AgreedStop, Hosts, call_roll, split_address
from llama_jax.training.config_sections import DistributedConfig

LOST = 1  # exit status of a process that another one has left alone

# What launchers set where there is more than one process, besides what JAX finds out by itself.
_COORDINATOR, _PROCESSES, _PROCESS = (
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
)
_BIND = "JAX_COORDINATOR_BIND_ADDRESS"


class Group(NamedTuple):
    """The processes of a run before they have met.

    Attributes:
      coordinator: `HOST:PORT` of process 0.
      bind: `HOST:PORT` at which process 0 listens.
      processes: how many.
      process: number of this one.
      local_devices: devices of this machine that belong to this process; `None` for all.
    """

    coordinator: str
    bind: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None


def find_group(config: DistributedConfig, environment: Mapping[str, str]) -> Group | None:
    """The processes of a run: what the config says, else the environment; `None` for one process
    alone.

    Raises:
      InputError: naming what is missing.
    """
    if config.mode == "off":
        return None
    given = (
        config.coordinator or environment.get(_COORDINATOR),
        config.processes if config.processes is not None else _number(environment, _PROCESSES),
        config.process if config.process is not None else _number(environment, _PROCESS),
    )
    found = _detect(*given, config.startup_seconds) if None in given else (*given, None)
    wanted = config.mode == "on" or any(value is not None for value in given)
    if not wanted and (found[1] or 1) == 1:
        return None
    coordinator, processes, process = _complete(*found[:3])
    unbound = coordinator if given[0] is not None else f"[::]:{split_address(coordinator)[1]}"
    return Group(coordinator, environment.get(_BIND) or unbound, processes, process, found[3])


def _complete(
    coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str, int, int]:
    """What makes up a group, all of it."""
    if coordinator is None or processes is None or process is None:
        names = {"coordinator": coordinator, "processes": processes, "process": process}
        missing = next(name for name, value in names.items() if value is None)
        raise InputError(
            f"distributed.{missing}: none given, and the environment does not tell; give "
            "coordinator, processes and process, "
            "or distributed.mode off"
        )
    if not 0 <= process < processes:
        raise InputError(
            f"distributed.process: {process} given, a number from 0 to {processes - 1} expected"
        )
    return coordinator, processes, process


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is not None and not text.isdecimal():
        raise InputError(f"{name}: {text!r} in the environment, a number expected")
    return None if text is None else int(text)


def _detect(
    coordinator: str | None, processes: int | None, process: int | None, seconds: int
) -> tuple[str | None, int | None, int | None, tuple[int, ...] | None]:
    """What JAX finds out from Slurm, Open MPI, Kubernetes and Cloud TPU; as it is where there is
    none of them.
    """
    from jax._src.clusters import ClusterEnv  # no public function tells this without starting

    try:
        *found, local = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, processes, process, None, None, seconds
        )
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"distributed: the environment cannot be made sense of ({error}); give "
            "coordinator, processes and "
            "process, or distributed.mode off"
        ) from None
    address, count, number = found
    return (
        None if address is None else str(address),
        None if count is None else int(count),
        None if number is None else int(number),
        None if local is None else tuple(local),
    )


@contextlib.contextmanager
def several_processes(config: DistributedConfig, environment: Mapping[str, str]) -> Iterator[Hosts]:
    """Meets the other processes, if there are any, and leaves them; before JAX is asked for its
    devices.

    A process that fails alone ends at once, without waiting for the others, which then notice it;
    with status 1 where it was another that failed.

    Raises:
      InputError: for a config that does not make up a group; when others do not come.
    """
    group = find_group(config, environment)
    if group is None or group.processes == 1:
        yield Hosts()
        return
    hosts = _meet(group, config)
    try:
        yield hosts
    except InputError as error:
        if not isinstance(error, AgreedStop):
            hosts.tell(f"process {hosts.process}: {error}")
        _part()
        raise
    except BaseException as error:
        _leave(_ending(error, hosts))
    _part()


def _meet(group: Group, config: DistributedConfig) -> Hosts:
    import jax
    from jax._src.distributed import (
        global_state,
    )  # its client has no public name; Orbax takes it from here too

    def say(line: str) -> None:
        """A line on standard error."""
        print(line, file=sys.stderr, flush=True)

    call_roll(
        group.coordinator, group.bind, group.process, group.processes, config.startup_seconds, say
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        group.coordinator,
        group.processes,
        group.process,
        local_device_ids=group.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=config.startup_seconds,
        heartbeat_timeout_seconds=config.heartbeat_seconds,
        shutdown_timeout_seconds=config.heartbeat_seconds,
        coordinator_bind_address=group.bind,
    )
    return Hosts(group.process, group.processes, global_state.client, config.startup_seconds)


def _part() -> None:
    """Leaves when all leave."""
    import jax

    with contextlib.suppress(
        RuntimeError
    ):  # one that has gone already: there is nothing left to be lost
        jax.distributed.shutdown()


def _ending(error: BaseException, hosts: Hosts) -> int:
    """Says what a process ends with, and how; the others are told where they still listen."""
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):
        who = f"process {hosts.process} of {hosts.count}"
        reason = textwrap.shorten(str(error), 160, placeholder=" ...")
        print(
            f"error: {who} lost the others ({reason}); start all again: the run goes on "
            "from its newest checkpoint",
            file=sys.stderr,
        )
        return LOST

    with contextlib.suppress(RuntimeError):
        hosts.tell(f"process {hosts.process} ended: {type(error).__name__} {error}")
        time.sleep(1)  # for those who still listen: with process 0 goes what they listen to

    def again() -> int:
        """For the one place that knows what to print."""
        raise error

    return run_program(again)


def _leave(status: int) -> None:
    """Ends the process without its farewells, which would wait for processes that are not
    coming.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# --- stopping ---
#
# When a training is to end before its last step: signals, a time limit, a file; on one host or on
# several.


RUN_STOP = "STOP"  # `touch RUN/STOP` saves and ends a run

_AT_ONCE_SECONDS = 5  # a Ctrl-C so soon after the first request interrupts
_LOOK_SECONDS = 1  # between two looks for the file: shared file systems are slow


class StopRequest:
    """Whether the run is to be saved and ended: SIGTERM, the first Ctrl-C, SIGUSR1, `RUN/STOP`, or
    the time is over.

    A Ctrl-C within 5 seconds of the first request interrupts at once. Other signals never do:
    schedulers send several.

    With several processes every request becomes a SIGTERM to the process itself, which belongs to
      JAX there: its
    preemption service tells the others and finds the step that all of them reach, without waiting
    for the device.
    """

    def __init__(
        self,
        run: pathlib.Path,
        deadline: float = math.inf,
        reached: Callable[[int], bool] | None = None,
        looks: bool = True,
    ) -> None:
        """Takes over the signals.

        Args:
          run: directory of the run.
          deadline: by `time.monotonic`.
          reached: asks JAX whether a step is the one to end at; `None` for a single process.
          looks: whether this process looks at the clock and for the file.
        """
        self._file, self._deadline, self._reached, self._looks = (
            run / RUN_STOP,
            deadline,
            reached,
            looks,
        )
        self._asked_at: float | None = None
        self._looked = 0.0
        own = (signal.SIGINT, signal.SIGUSR1, *([] if reached else [signal.SIGTERM]))
        for number in own:
            signal.signal(number, self._on_signal)

    def __call__(self, step: int) -> bool:
        """Asked by the loop after every step."""
        if self._looks and self._asked_at is None:
            self._look()
        return self._reached(step) if self._reached else self._asked_at is not None

    def close(self) -> None:
        """Removes the file, once it has been obeyed."""
        if self._looks:
            self._file.unlink(missing_ok=True)

    def _look(self) -> None:
        now = time.monotonic()
        if now > self._deadline:
            self._ask("run.max_time")
        elif now > self._looked + _LOOK_SECONDS:
            self._looked = now
            if self._file.exists():
                self._ask(str(self._file))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        soon = self._asked_at is not None and time.monotonic() < self._asked_at + _AT_ONCE_SECONDS
        if number == signal.SIGINT and soon:
            raise KeyboardInterrupt
        self._ask(signal.Signals(number).name)

    def _ask(self, who: str) -> None:
        self._asked_at = time.monotonic()
        line = f"{who}: saving after this step; Ctrl-C within {_AT_ONCE_SECONDS} s ends at once\n"
        with contextlib.suppress(
            OSError
        ):  # nobody may be listening any more; the state is to be saved all the same
            os.write(
                2, line.encode()
            )  # print is not safe in a handler: the signal may have come inside another print
        if self._reached:
            os.kill(os.getpid(), signal.SIGTERM)


# --- compilation ---
#
# What JAX is told before it starts: where to keep compiled programs, and how many threads virtual
# devices need.


def keep_compiled_programs() -> None:
    """Points JAX to a compilation cache of this user, unless JAX_COMPILATION_CACHE_DIR says
    otherwise.

    The directory is readable by its owner only: it holds native code that JAX will run.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        directory = base / "llama_jax" / "compiled"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
    except (OSError, RuntimeError):
        return  # a home that cannot be written to, or a user without one: compile anew each time
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_room_for_virtual_devices() -> None:
    """Gives XLA's CPU client threads enough for virtual devices
    (XLA_FLAGS=--xla_force_host_platform_device_count=8).

    It has one thread a core by default; with fewer threads than devices waiting in collectives, a
    program can stand still until XLA aborts it. To be called before JAX meets its devices.
    """
    found = re.search(
        r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", "")
    )
    if found:
        os.environ.setdefault("NPROC", str(max(16, 2 * int(found[1]))))
