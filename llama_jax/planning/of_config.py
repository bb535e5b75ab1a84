"""From a training's config to a plan's job, and the setting of remat that `compute.remat: auto` stands for."""

import dataclasses
import math

from llama_jax.model.remat import LADDER
from llama_jax.planning.chips import Chip, Topology, chip_of
from llama_jax.planning.job import Job, MeshSizes
from llama_jax.planning.plan import make_plan
from llama_jax.training.config import TrainConfig

# Any chip whose figures are not known: its memory is what the job seems to need, so that it has to need less.
_UNKNOWN = Chip("unknown", "TPU v5e", 0.0, 1e12, 1e11, 1e10, 0.5, "", 0, 1, 8)
_SHARE = 0.95  # of the memory that `auto` plans with: fragmentation is in no figure


def devices_of(device_kind: str, devices: int) -> Topology:
    """So many devices of a kind, as JAX calls it, all near each other."""
    return Topology(device_kind, chip_of(device_kind) or _UNKNOWN, (devices,), 1)


def job_of(config: TrainConfig, topology: Topology, compute_dtype: str = "bfloat16") -> Job:
    """The job that a training config describes on chips; `remat: auto` is taken as `full`.

    Args:
      config: of the run.
      topology: the chips.
      compute_dtype: what `compute.dtype: auto` stands for on them.

    Raises:
      InputError: for a mesh that does not fit chips, model or batch.
    """
    sizes = {axis: getattr(config.mesh, axis) for axis in MeshSizes._fields}
    known = math.prod(size for size in sizes.values() if size != -1)
    mesh = MeshSizes(**{axis: topology.chips // known if size == -1 else size for axis, size in sizes.items()})
    dtype = compute_dtype if config.compute.dtype == "auto" else config.compute.dtype
    base = config.adapter.base
    return Job(
        config.model,
        topology,
        mesh,
        length=config.data.length,
        rows=config.data.batch_rows,
        microbatches=config.data.accumulation,
        remat="full" if config.compute.remat == "auto" else config.compute.remat,
        optimizer=config.optimizer.name,
        moment_dtype=config.optimizer.moments_dtype,
        param_dtype=config.optimizer.param_dtype,
        compute_dtype=dtype,
        loss_chunk=config.compute.loss_chunk,
        rank=config.adapter.rank,
        base_dtype=dtype if base == "auto" else base,
    )


def first_fitting_remat(job: Job, memory: float | None = None) -> str:
    """The rung of the ladder with the least to be computed again that fits into 95 % of a chip's memory.

    `full` where none fits, and where the memory is not known.

    Args:
      job: the training, whatever its own `remat`.
      memory: bytes of one chip, where they are known better than by the table of chips.
    """
    limit = _SHARE * (memory or job.topology.chip.memory)
    fitting = (remat for remat in LADDER if make_plan(dataclasses.replace(job, remat=remat), limit).fits)
    return next(fitting, LADDER[-1])


def remat_candidates(job: Job, memory: float | None = None, before: str | None = None) -> tuple[str, ...]:
    """What `compute.remat: auto` may stand for, in the order in which to ask the compiler; the last need not be asked.

    What the run has had before, then the rungs that fit by the closed form, into the whole memory: it may be some percent too
    large. `full` is always the last. Where the memory is not known, what was before, else `full`.

    Args:
      job: the training.
      memory: bytes of one chip, where they are known.
      before: setting of remat with which the run was trained so far, if it was.
    """
    limit, earlier = memory or job.topology.chip.memory, [before] if before else []
    if not limit:
        return (before or LADDER[-1],)
    fitting = [remat for remat in (*earlier, *LADDER) if make_plan(dataclasses.replace(job, remat=remat), limit).fits]
    once = list(dict.fromkeys((*fitting, LADDER[-1])))
    return tuple(once[: once.index(LADDER[-1]) + 1])


def leaves_room(needed: float, limit: float) -> bool:
    """Whether what a compiled step needs, in bytes of one chip, is at most 95 % of them."""
    return needed <= _SHARE * limit
