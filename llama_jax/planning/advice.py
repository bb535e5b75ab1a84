"""Advice for a training that has run out of memory: what to change in its config, from the same search as a plan."""

import re

from llama_jax.planning.flags import flags
from llama_jax.planning.job import Job
from llama_jax.planning.plan import Plan, Remedy, make_plan
from llama_jax.planning.search import remedies

_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OOM when allocating", re.IGNORECASE)
_WANTED = re.compile(r"allocat\w*\s+([0-9][0-9.,]*)\s*([KMGT]i?B|bytes)", re.IGNORECASE)
_UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
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


def advice(job: Job, memory: float | None = None, most: int = 2) -> list[str]:
    """One to three lines for a job that has run out of memory.

    Args:
      job: the training, see `llama_jax.planning.of_config.job_of`.
      memory: bytes of one device, where they are known; otherwise those in the table of chips.
      most: remedies to name.
    """
    limit = memory or job.topology.chip.memory
    plan = make_plan(job, limit)
    needed = plan.memory.total
    lines = [_need_line(plan, limit)]
    # What has not fit did not fit, whatever the closed form says of it.
    smaller = plan._replace(limit=min(limit or needed, _LESS * needed))
    found = remedies(smaller, most)
    if not found:
        return [*lines, "no setting of compute.remat, data.accumulation, compute.loss_chunk or the mesh saves enough: "
                "use more devices, adapters (adapter.rank), shorter rows (data.length) or a smaller model"]  # fmt: skip
    return [*lines, *[f"{'or' if i else 'try'} {_remedy_line(remedy, plan)}" for i, remedy in enumerate(found)]]


def _remedy_line(remedy: Remedy, plan: Plan) -> str:
    speed = remedy.plan.speed
    times = plan.speed.tokens_per_second / speed.tokens_per_second
    typed = flags(remedy, plan.job)
    return f"{typed}: {_gigabytes(remedy.plan.memory.total)} a device, {times:.2f} times the time of a step"


def _need_line(plan: Plan, limit: float) -> str:
    parts = plan.memory._asdict()
    largest = sorted(parts, key=lambda name: -parts[name])[:2]
    words = " and ".join(f"{name} {_gigabytes(parts[name])}" for name in largest)
    known = f" of {_gigabytes(limit)}" if limit else ""
    return f"by the closed form this training needs {_gigabytes(plan.memory.total)}{known} a device, most of it {words}"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
