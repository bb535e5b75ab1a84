"""Changes to a job as they are typed: options of `plan`, or keys of a training's config."""

from collections.abc import Mapping

from llama_jax.planning.job import Job, MeshSizes
from llama_jax.planning.plan import Change, Remedy

# Names of the options by the fields of a job.
PLAN_KEYS = {"remat": "remat", "microbatches": "microbatches", "loss_chunk": "loss-chunk", "moment_dtype": "moment-dtype",
             "optimizer": "optimizer", "mesh": "mesh"}  # fmt: skip
TRAIN_KEYS = {"remat": "compute.remat", "microbatches": "data.accumulation", "loss_chunk": "compute.loss_chunk",
              "moment_dtype": "optimizer.moments_dtype", "optimizer": "optimizer.name"}  # fmt: skip


def flags(remedy: Remedy, job: Job, keys: Mapping[str, str]) -> str:
    """A remedy as it is typed.

    Args:
      remedy: for the job.
      job: as it is now.
      keys: names of the options, `PLAN_KEYS` or `TRAIN_KEYS`; without one for the mesh, each axis is set by itself.
    """
    return " ".join(word for change in remedy.changes for word in _words(change, job, keys))


def _words(change: Change, job: Job, keys: Mapping[str, str]) -> list[str]:
    if not isinstance(change.value, MeshSizes):
        return [f"--{keys[change.name]} {change.value}"]
    if "mesh" in keys:
        return [f"--{keys['mesh']} {change.value}"]
    changed = [axis for axis in MeshSizes._fields if getattr(change.value, axis) != getattr(job.mesh, axis)]
    return [f"--mesh.{axis} {getattr(change.value, axis)}" for axis in changed]
