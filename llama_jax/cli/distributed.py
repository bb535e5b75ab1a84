"""The start and the end of a training of several processes: who they are, by config or environment; how each one leaves."""

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from llama_jax.cli.program import run_program
from llama_jax.errors import InputError
from llama_jax.parallel.hosts import AgreedStop, Hosts
from llama_jax.parallel.roll_call import call_roll, split_address
from llama_jax.training.config_distributed import DistributedConfig

LOST = 1  # exit status of a process that another one has left alone

# What launchers set where there is more than one process, besides what JAX finds out by itself.
_COORDINATOR, _PROCESSES, _PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
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
    """The processes of a run: what the config says, else the environment; `None` for one process alone.

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


def _complete(coordinator: str | None, processes: int | None, process: int | None) -> tuple[str, int, int]:
    """What makes up a group, all of it."""
    if coordinator is None or processes is None or process is None:
        names = {"coordinator": coordinator, "processes": processes, "process": process}
        missing = next(name for name, value in names.items() if value is None)
        raise InputError(
            f"distributed.{missing}: none given, and the environment does not tell; give coordinator, processes and process, "
            "or distributed.mode off"
        )
    if not 0 <= process < processes:
        raise InputError(f"distributed.process: {process} given, a number from 0 to {processes - 1} expected")
    return coordinator, processes, process


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if text is not None and not text.isdecimal():
        raise InputError(f"{name}: {text!r} in the environment, a number expected")
    return None if text is None else int(text)


def _detect(
    coordinator: str | None, processes: int | None, process: int | None, seconds: int
) -> tuple[str | None, int | None, int | None, tuple[int, ...] | None]:
    """What JAX finds out from Slurm, Open MPI, Kubernetes and Cloud TPU; as it is where there is none of them."""
    from jax._src.clusters import ClusterEnv  # no public function tells this without starting

    try:
        *found, local = ClusterEnv.auto_detect_unset_distributed_params(coordinator, processes, process, None, None, seconds)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"distributed: the environment cannot be made sense of ({error}); give coordinator, processes and "
                         "process, or distributed.mode off") from None  # fmt: skip
    address, count, number = found
    return (
        None if address is None else str(address),
        None if count is None else int(count),
        None if number is None else int(number),
        None if local is None else tuple(local),
    )


@contextlib.contextmanager
def several_processes(config: DistributedConfig, environment: Mapping[str, str]) -> Iterator[Hosts]:
    """Meets the other processes, if there are any, and leaves them; before JAX is asked for its devices.

    A process that fails alone ends at once, without waiting for the others, which then notice it; with status 1 where it
    was another that failed.

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
    from jax._src.distributed import global_state  # its client has no public name; Orbax takes it from here too

    def say(line: str) -> None:
        """A line on standard error."""
        print(line, file=sys.stderr, flush=True)

    call_roll(group.coordinator, group.bind, group.process, group.processes, config.startup_seconds, say)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        group.coordinator, group.processes, group.process, local_device_ids=group.local_devices,
        cluster_detection_method="deactivate", initialization_timeout=config.startup_seconds,
        heartbeat_timeout_seconds=config.heartbeat_seconds, shutdown_timeout_seconds=config.heartbeat_seconds,
        coordinator_bind_address=group.bind,
    )  # fmt: skip
    return Hosts(group.process, group.processes, global_state.client, config.startup_seconds)


def _part() -> None:
    """Leaves when all leave."""
    import jax

    with contextlib.suppress(RuntimeError):  # one that has gone already: there is nothing left to be lost
        jax.distributed.shutdown()


def _ending(error: BaseException, hosts: Hosts) -> int:
    """Says what a process ends with, and how; the others are told where they still listen."""
    import jax

    if isinstance(error, jax.errors.JaxRuntimeError):
        who = f"process {hosts.process} of {hosts.count}"
        reason = textwrap.shorten(str(error), 160, placeholder=" ...")
        print(f"error: {who} lost the others ({reason}); start all again: the run goes on from its newest checkpoint",
              file=sys.stderr)  # fmt: skip
        return LOST

    with contextlib.suppress(RuntimeError):
        hosts.tell(f"process {hosts.process} ended: {type(error).__name__} {error}")
        time.sleep(1)  # for those who still listen: with process 0 goes what they listen to

    def again() -> int:
        """For the one place that knows what to print."""
        raise error

    return run_program(again)


def _leave(status: int) -> None:
    """Ends the process without its farewells, which would wait for processes that are not coming."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
