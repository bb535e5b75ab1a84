"""What `auto` in a training's config stands for on the devices at hand, where it takes a plan to tell."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path

from llama_jax.cli.arguments import parse_train
from llama_jax.errors import InputError
from llama_jax.parallel.hosts import Hosts
from llama_jax.planning.job import Job
from llama_jax.planning.of_config import devices_of, job_of, leaves_room, remat_candidates
from llama_jax.training.config import TrainConfig

# Seconds that the processes wait for each other's compilation: one may have found the program in its cache, others not.
_COMPILING = 4 * 3600.0


def job_here(config: TrainConfig) -> tuple[Job, float | None]:
    """The job of a run on the devices at hand, and the bytes that one of them has for it where it tells.

    Raises:
      InputError: for a mesh that does not fit devices, model or batch.
    """
    import jax

    from llama_jax.training.setup import compute_dtype

    device = jax.local_devices()[0]  # those of other processes do not tell of their memory
    job = job_of(config, devices_of(device.device_kind, jax.device_count()), compute_dtype(config.compute))
    return job, (device.memory_stats() or {}).get("bytes_limit")


def with_remat(config: TrainConfig, remat: str) -> TrainConfig:
    """The config with a setting of remat in place of its own."""
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat))


def candidates(config: TrainConfig, hosts: Hosts, going_on: bool) -> tuple[str, ...]:
    """What `compute.remat` may stand for, in the order in which to try; on all processes alike.

    Args:
      config: of the run.
      hosts: its processes.
      going_on: whether there are checkpoints to go on from: what the run has had so far is tried first.

    Raises:
      InputError: for a mesh that does not fit devices, model or batch.
    """
    if config.compute.remat != "auto":
        return (config.compute.remat,)
    # Another process may read another amount of memory off its devices.
    return tuple(hosts.agree("remat", " ".join(_candidates(config, going_on))).split())


def first_that_fits(config: TrainConfig, remats: tuple[str, ...], hosts: Hosts, say: Callable[[str], None]) -> str:
    """The first setting of remat with which the compiled step leaves 5 % of the memory of every device; else the last.

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
        everywhere = [tuple(map(float, words.split())) for words in hosts.gather(f"remat {remat}", figures, _COMPILING)]
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
    """Bytes that the compiled step of a run needs on one of the devices at hand; infinite where the compiler gives it up.

    The step is that of the run's largest batch: what several micro-batches are added up in takes memory, too.
    """
    import jax

    from llama_jax.data.steps import Steps
    from llama_jax.planning.ahead import too_large
    from llama_jax.training.config_data import micro_rows
    from llama_jax.training.setup import frozen_shapes, make_recipe, run_mesh
    from llama_jax.training.step import lowered_step

    recipe, mesh, rows = make_recipe(config), run_mesh(config), micro_rows(config.data)
    most = Steps(config.data.batch_rows, config.data.batch_ramp, config.data.skip_steps).most_rows
    lowered = lowered_step(recipe, mesh, (most // rows, rows, config.data.length), *frozen_shapes(config, recipe, mesh))
    try:
        with jax.set_mesh(mesh):
            memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if too_large(error) is None:
            raise
        return math.inf
    assert memory is not None
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def _candidates(config: TrainConfig, going_on: bool) -> tuple[str, ...]:
    import jax

    if jax.local_devices()[0].platform == "cpu":
        return ("none",)  # there is no table of what memory a CPU's program can have
    before = recorded_config(config.run.dir) if going_on else None
    remat = None if before is None or before.compute.remat == "auto" else before.compute.remat
    return remat_candidates(*job_here(config), remat)


def recorded_config(directory: str) -> TrainConfig | None:
    """The config with which the run in a directory was trained last; `None` where that cannot be read."""
    from llama_jax.training.run_directory import RUN_CONFIG

    path = Path(directory) / RUN_CONFIG
    with contextlib.suppress(InputError):
        return parse_train(["--config", str(path)], path)
    return None
