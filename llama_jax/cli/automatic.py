"""What `auto` in a training's config stands for on the devices at hand, where it takes a plan to tell."""

import contextlib
import dataclasses
from pathlib import Path

from llama_jax.cli.arguments import parse_train
from llama_jax.errors import InputError
from llama_jax.parallel.hosts import Hosts
from llama_jax.planning.job import Job
from llama_jax.planning.of_config import automatic_remat, devices_of, job_of
from llama_jax.training.config import TrainConfig


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


def with_remat(config: TrainConfig, hosts: Hosts, going_on: bool) -> TrainConfig:
    """The config with `compute.remat: auto` resolved, on all processes alike: the memory of their devices may differ a little.

    Args:
      config: of the run.
      hosts: its processes.
      going_on: whether there are checkpoints to go on from: what the run has had so far is kept where it fits.

    Raises:
      InputError: for a mesh that does not fit devices, model or batch.
    """
    if config.compute.remat != "auto":
        return config
    remat = hosts.agree("remat", _choose(config, going_on))
    return dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat))


def _choose(config: TrainConfig, going_on: bool) -> str:
    import jax

    if jax.local_devices()[0].platform == "cpu":
        return "none"  # there is no table of what memory a CPU's program can have
    return automatic_remat(*job_here(config), _recorded(config) if going_on else None)


def _recorded(config: TrainConfig) -> str | None:
    """What the run in the directory was trained with; `None` where that cannot be read."""
    from llama_jax.training.run_directory import RUN_CONFIG

    path = Path(config.run.dir) / RUN_CONFIG
    with contextlib.suppress(InputError):
        remat = parse_train(["--config", str(path)], path).compute.remat
        return None if remat == "auto" else remat
    return None
