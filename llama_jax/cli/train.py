"""`train`: a run described by a YAML file and overrides; the same command again goes on where it
stopped.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from llama_jax.cli.arguments import parse_train, to_yaml
from llama_jax.cli.distributed import (
    StopRequest,
    keep_compiled_programs,
    make_room_for_virtual_devices,
    several_processes,
)
from llama_jax.cli.main import DAMAGED
from llama_jax.config import LlamaConfig
from llama_jax.errors import DeviceMemoryError, InputError
from llama_jax.parallel.hosts import Hosts
from llama_jax.planning.job import Job
from llama_jax.planning.plan import devices_of, job_of, leaves_room, remat_candidates
from llama_jax.storage import atomic_write
from llama_jax.training.config import TrainConfig, with_remat
from llama_jax.training.config_sections import DistributedConfig, wall_seconds

# --- automatic ---
#
# What `auto` in a training's config stands for on the devices at hand, where it takes a plan to
# tell.


# Seconds that the processes wait for each other's compilation: one may have found the program in
# its cache, others not.
_COMPILING = 4 * 3600.0


def job_here(config: TrainConfig) -> tuple[Job, float | None]:
    """The job of a run on the devices at hand, and the bytes that one of them has for it where it
    tells.

    Raises:
      InputError: for a mesh that does not fit devices, model or batch.
    """
    import jax

    from llama_jax.model.options import resolve_dtype

    device = jax.local_devices()[0]  # those of other processes do not tell of their memory
    job = job_of(
        config,
        devices_of(device.device_kind, jax.device_count()),
        resolve_dtype(config.compute.dtype),
    )
    return job, (device.memory_stats() or {}).get("bytes_limit")


def candidates(config: TrainConfig, hosts: Hosts, going_on: bool) -> tuple[str, ...]:
    """What `compute.remat` may stand for, in the order in which to try; on all processes alike.

    Args:
      config: of the run.
      hosts: its processes.
      going_on: whether there are checkpoints to go on from: what the run has had so far is tried
        first.

    Raises:
      InputError: for a mesh that does not fit devices, model or batch.
    """
    if config.compute.remat != "auto":
        return (config.compute.remat,)
    # Another process may read another amount of memory off its devices.
    return tuple(hosts.agree("remat", " ".join(_candidates(config, going_on))).split())


def first_that_fits(
    config: TrainConfig, remats: tuple[str, ...], hosts: Hosts, say: Callable[[str], None]
) -> str:
    """The first setting of remat with which the compiled step leaves 5 % of the memory of every
    device; else the last.

    The last is not compiled here. What is compiled lies in JAX's cache when the run comes to it.

    Args:
      config: of the run, complete.
      remats: to be tried in turn.
      hosts: its processes; all compile the same.
      say: what is told where one does not fit.
    """
    for remat, following in itertools.pairwise(remats):
        tried = with_remat(config, remat)
        job, memory = job_here(tried)
        figures = f"{compiled_bytes(tried)} {memory or job.topology.chip.memory}"
        everywhere = [
            tuple(map(float, words.split()))
            for words in hosts.gather(f"remat {remat}", figures, _COMPILING)
        ]
        needed, limit = max(everywhere, key=lambda each: each[0] / each[1])
        if leaves_room(needed, limit):
            return remat
        if math.isfinite(needed):
            takes = f"takes {needed / 1e9:.1f} of {limit / 1e9:.1f} GB of a device, more than 95 %"
        else:
            takes = f"does not fit into the {limit / 1e9:.1f} GB of a device"
        say(f"remat {remat}: the compiled step {takes}; {following} is next")
    return remats[-1]


def compiled_bytes(config: TrainConfig) -> float:
    """Bytes that the compiled step of a run needs on one of the devices at hand; infinite where the
    compiler gives it up.

    The step is that of the run's largest batch: what several micro-batches are added up in takes
    memory, too.
    """
    import jax

    from llama_jax.data.batches import Steps
    from llama_jax.planning.compile import too_large
    from llama_jax.training.config_sections import micro_batch_size
    from llama_jax.training.setup import frozen_shapes, make_recipe, run_mesh
    from llama_jax.training.step import lowered_step

    recipe, mesh, sequences = make_recipe(config), run_mesh(config), micro_batch_size(config.data)
    most = Steps(
        config.data.batch_size, config.data.batch_ramp, config.data.skip_steps
    ).most_sequences
    lowered = lowered_step(
        recipe,
        mesh,
        (most // sequences, sequences, config.data.length),
        *frozen_shapes(config, recipe, mesh),
    )
    try:
        with jax.set_mesh(mesh):
            memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if too_large(error) is None:
            raise
        return math.inf
    assert memory is not None
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _candidates(config: TrainConfig, going_on: bool) -> tuple[str, ...]:
    import jax

    if jax.local_devices()[0].platform == "cpu":
        return ("none",)  # there is no table of what memory a CPU's program can have
    before = recorded_config(config.run.dir) if going_on else None
    remat = None if before is None or before.compute.remat == "auto" else before.compute.remat
    return remat_candidates(*job_here(config), remat)


def recorded_config(directory: str) -> TrainConfig | None:
    """The config with which the run in a directory was trained last; `None` where that cannot be
    read.
    """
    from llama_jax.training.checkpointing import RUN_CONFIG

    path = Path(directory) / RUN_CONFIG
    with contextlib.suppress(InputError):
        return parse_train(["--config", str(path)], path)
    return None


# --- train ---


_DEFAULT = pathlib.Path("configs/debug.yaml")
_EXIT_SECONDS = 60  # after a run with saves that have failed


def quiet_libraries() -> None:
    """Leaves it to the loop to tell, in a line, of a checkpoint that failed: Orbax logs hundreds,
    one traceback a thread.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    shown = sys.unraisablehook
    # What TensorStore's threads say when a save has failed and its event loop is gone.
    sys.unraisablehook = lambda given: (
        None if str(given.exc_value) == "Event loop is closed" else shown(given)
    )


def end_within(seconds: float, status: int) -> None:
    """Ends the program if it has not ended by itself by then: a thread of a save that has failed
    may wait for ever.
    """
    timer = threading.Timer(seconds, os._exit, (status,))
    timer.daemon = True
    timer.start()


def write_config(config: TrainConfig, path: pathlib.Path) -> None:
    """Writes the resolved config, from which the run can be gone on with: without the wish to start
    anew, on any processes.
    """
    lasting = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, overwrite=False),
        distributed=DistributedConfig(),
    )
    with atomic_write(path) as file:
        file.write(to_yaml(lasting).encode())


def finished_line(config: TrainConfig, step: int) -> str:
    """What is said where there is nothing left to do."""
    from llama_jax.training.checkpointing import schedule_choices

    return (
        f"{config.run.dir} has {step} of {config.run.steps} steps: nothing left to do. "
        "Generate with: python infer.py --model "
        f"{config.run.dir} --prompt TEXT; train on with --run.steps N (and say what the "
        "learning rate is to do: "
        f"{schedule_choices(recorded_config(config.run.dir) or config, step)}), or anew "
        "with --run.overwrite true"
    )


def architecture(path: str) -> LlamaConfig:
    """The architecture of a model on disk."""
    from llama_jax.weights.open import open_model

    return open_model(path).source.config


def memory_lines(config: TrainConfig, error: Exception) -> list[str]:
    """What is said of a run that a device has too little memory for, and what may help; nothing for
    another error.
    """
    from llama_jax.planning.plan import advice, is_out_of_memory, wanted_bytes

    if not is_out_of_memory(str(error)):
        return []
    import jax

    kind = jax.local_devices()[0].device_kind
    wanted = wanted_bytes(str(error))
    asked = "" if wanted is None else f" ({wanted / 1e9:.3g} GB more were asked for)"
    first = (
        f"a device ({kind}) has run out of memory{asked}; checkpoints of {config.run.dir} "
        "are untouched"
    )
    try:
        job, memory = job_here(config)
    except InputError:
        return [first]
    return [first, *advice(job, memory)]


def main(arguments: list[str], default: pathlib.Path = _DEFAULT) -> int:
    """Runs `train` and returns its exit status: 0 when done or cleanly stopped, 5 when the last
    state could not be saved.

    Raises:
      DeviceMemoryError: when a device has run out of memory.
    """
    started = time.monotonic()
    config = parse_train(arguments, default, architecture)
    make_room_for_virtual_devices()
    quiet_libraries()
    with several_processes(config.distributed, os.environ) as hosts:
        return train(config, hosts, started)


def train(config: TrainConfig, hosts: Hosts, started: float) -> int:
    """Trains if anything is left to do; returns the exit status.

    Args:
      config: of the run.
      hosts: the processes that train together.
      started: when the program began, by `time.monotonic`.
    """
    from llama_jax.training.checkpointing import RUN_CONFIG, newest_step, summary_lines
    from llama_jax.training.consistency import describe_program, require_same
    from llama_jax.training.display import Display, WorkerDisplay, open_display
    from llama_jax.training.loop import Run, prepare
    from llama_jax.training.setup import require_same_model
    from llama_jax.training.step import preempted

    directory = pathlib.Path(config.run.dir)
    require_same(hosts, "program", describe_program(config) if hosts.count > 1 else {})
    newest = 0 if config.run.overwrite else newest_step(directory)
    step = int(hosts.agree("newest step", str(newest)))
    if step >= config.run.steps:
        require_same_model(config)
        if hosts.first:
            print(finished_line(config, step))
        return 0

    keep_compiled_programs()
    before = recorded_config(config.run.dir) if step else None
    remats = candidates(config, hosts, going_on=step > 0)
    config = with_remat(config, remats[0])
    stop = StopRequest(
        directory,
        started + wall_seconds(config.run.max_time),
        preempted if hosts.count > 1 else None,
        hosts.first,
    )
    interactive = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    worker = WorkerDisplay(sys.stderr, f"process {hosts.process}: ")
    display: Display = open_display(sys.stdout, interactive) if hosts.first else worker
    lines: dict[str, str] = {}
    run: Run | None = None
    try:
        run = prepare(
            config,
            display,
            hosts,
            before,
            lambda complete: first_that_fits(complete, remats, hosts, display.event),
        )
        summary = run.train(stop, lambda config: write_config(config, directory / RUN_CONFIG))
        lines = summary_lines(summary, time.monotonic() - started)
        stop.close()
    except RuntimeError as error:  # the runtime's own errors are of this kind
        advice_lines = memory_lines(run.config if run else config, error)
        if not advice_lines:
            raise
        raise DeviceMemoryError(*advice_lines) from None
    finally:
        display.finish(lines)
    status = 0 if summary.saved else DAMAGED
    if summary.failed_saves:
        end_within(_EXIT_SECONDS, status)
    return status
