"""Advice for a training that has run out of memory: what to change in its config, from the same search as a plan."""

import dataclasses
import math
import re

from llama_jax.planning.chips import Chip, Topology, chip_of
from llama_jax.planning.flags import TRAIN_KEYS, flags
from llama_jax.planning.job import Job, MeshSizes
from llama_jax.planning.plan import Plan, Remedy, make_plan
from llama_jax.planning.search import remedies
from llama_jax.training.config import MeshConfig, TrainConfig

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OOM when allocating", re.IGNORECASE)
_WANTED = re.compile(r"allocat\w*\s+([0-9][0-9.,]*)\s*([KMGT]i?B|bytes)", re.IGNORECASE)
_UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
# Any chip whose figures are not known: its memory is what the job seems to need, so that it has to need less.
_UNKNOWN = Chip("unknown", "TPU v5e", 0.0, 1e12, 1e11, 1e10, 0.5, "", 0, 1, 8)
_CANDIDATES = 20
_LESS = 0.9  # of what a job seemed to need when it did not fit


def is_out_of_memory(text: str) -> bool:
    """Whether an error of the runtime says that a device has too little memory."""
    return _OUT_OF_MEMORY.search(text) is not None


def wanted_bytes(text: str) -> float | None:
    """Bytes that could not be had, where an error of the runtime names them."""
    found = _WANTED.search(text)
    if found is None:
        return None
    return float(found[1].replace(",", "").rstrip(".")) * _UNITS[found[2][0].lower()]


def job_of(config: TrainConfig, device_kind: str, devices: int, compute_dtype: str) -> Job:
    """The job that a training config describes, on so many devices of a kind.

    Args:
      config: of the run.
      device_kind: as JAX calls the devices.
      devices: in all.
      compute_dtype: what `compute.dtype` stands for on them.

    Raises:
      InputError: for a mesh that does not fit model or batch.
    """
    chip = chip_of(device_kind) or _UNKNOWN
    sizes = {axis: getattr(config.mesh, axis, 1) for axis in MeshSizes._fields}
    known = math.prod(size for size in sizes.values() if size != -1)
    mesh = MeshSizes(**{axis: devices // known if size == -1 else size for axis, size in sizes.items()})
    base = config.adapter.base
    return Job(
        config.model,
        Topology(device_kind, chip, (devices,), 1),
        mesh,
        length=config.data.length,
        rows=config.data.batch_rows,
        microbatches=config.data.accumulation,
        remat=config.compute.remat,
        optimizer=config.optimizer.name,
        moment_dtype=config.optimizer.moments_dtype,
        compute_dtype=compute_dtype,
        loss_chunk=config.compute.loss_chunk,
        rank=config.adapter.rank,
        base_dtype=compute_dtype if base == "auto" else base,
    )


def advice(job: Job, memory: float | None = None, most: int = 2) -> list[str]:
    """One to three lines for a job that has run out of memory.

    Args:
      job: the training, see `job_of`.
      memory: bytes of one device, where they are known; otherwise those in the table of chips.
      most: remedies to name.
    """
    limit = memory or job.topology.chip.memory
    plan = make_plan(job, limit)
    needed = plan.memory.total
    lines = [_need_line(plan, limit)]
    # What has not fit did not fit, whatever the closed form says of it.
    smaller = plan._replace(limit=min(limit or needed, _LESS * needed))
    found = [remedy for remedy in remedies(smaller, _CANDIDATES) if _possible(remedy)][:most]
    if not found:
        return [*lines, "no setting of compute.remat, data.accumulation, compute.loss_chunk or the mesh saves enough: "
                "use more devices, adapters (adapter.rank), shorter rows (data.length) or a smaller model"]  # fmt: skip
    return [*lines, *[f"{'or' if i else 'try'} {_remedy_line(remedy, plan)}" for i, remedy in enumerate(found)]]


def _possible(remedy: Remedy) -> bool:
    """Whether the config of a run has the axes of the remedy's mesh."""
    axes = {field.name for field in dataclasses.fields(MeshConfig)}
    return all(size == 1 or axis in axes for axis, size in remedy.plan.job.mesh._asdict().items())


def _remedy_line(remedy: Remedy, plan: Plan) -> str:
    speed = remedy.plan.speed
    times = plan.speed.tokens_per_second / speed.tokens_per_second
    typed = flags(remedy, plan.job, TRAIN_KEYS)
    return f"{typed}: {_gigabytes(remedy.plan.memory.total)} a device, {times:.2f} times the time of a step"


def _need_line(plan: Plan, limit: float) -> str:
    parts = plan.memory._asdict()
    largest = sorted(parts, key=lambda name: -parts[name])[:2]
    words = " and ".join(f"{name} {_gigabytes(parts[name])}" for name in largest)
    known = f" of {_gigabytes(limit)}" if limit else ""
    return f"by the closed form this training needs {_gigabytes(plan.memory.total)}{known} a device, most of it {words}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
