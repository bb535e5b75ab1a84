"""Changes to a job as they are typed: keys of a training's config, which `plan` takes too."""

from collections.abc import Iterator, Mapping

from llama_jax.planning.job import Job, MeshSizes
from llama_jax.planning.plan import Change, Remedy

# Keys of a training's config by the fields of a job; each axis of the mesh has a key of its own.
TRAIN_KEYS: Mapping[str, str] = {
    "length": "data.length", "remat": "compute.remat", "microbatches": "data.accumulation",
    "loss_chunk": "compute.loss_chunk", "optimizer": "optimizer.name", "moment_dtype": "optimizer.moments_dtype",
    "param_dtype": "optimizer.param_dtype", "rank": "adapter.rank", "base_dtype": "adapter.base",
}  # fmt: skip


def flags(remedy: Remedy, job: Job) -> str:
    """A remedy as it is typed, for `train.py` and for `plan`.

    Args:
      remedy: for the job.
      job: as it is now.
    """
    return " ".join(word for change in remedy.changes for word in _words(change, job))


def _words(change: Change, job: Job) -> Iterator[str]:
    if not isinstance(change.value, MeshSizes):
        yield f"--{TRAIN_KEYS[change.name]} {change.value}"
        return
    for axis, size in change.value._asdict().items():
        if size != getattr(job.mesh, axis):
            yield f"--mesh.{axis} {size}"
