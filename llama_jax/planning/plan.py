"""A plan: memory and speed of a job, the setting of remat that suits it, and what to change where it does not fit."""

import dataclasses
from typing import NamedTuple

from llama_jax.errors import InputError
from llama_jax.model.remat import LADDER
from llama_jax.planning.job import Job
from llama_jax.planning.memory import Memory, training_memory
from llama_jax.planning.speed import Speed, training_speed


class Plan(NamedTuple):
    """A job, and what it takes.

    Attributes:
      job: the training.
      memory: of one chip.
      speed: of an update.
      limit: bytes that a chip has for it.
    """

    job: Job
    memory: Memory
    speed: Speed
    limit: float

    @property
    def fits(self) -> bool:
        """Whether a chip has the memory."""
        return self.memory.total <= self.limit

    @property
    def left(self) -> float:
        """Bytes to spare, negative where there are too few."""
        return self.limit - self.memory.total


def make_plan(job: Job, limit: float | None = None) -> Plan:
    """Memory and speed of a job, on chips of their own memory or of another limit in bytes."""
    return Plan(job, training_memory(job), training_speed(job), job.topology.chip.memory if limit is None else limit)


def ladder_plans(job: Job) -> list[Plan]:
    """The plans of a job for every setting of remat, from the fastest to the smallest."""
    return [make_plan(dataclasses.replace(job, remat=remat)) for remat in LADDER]


def best_remat(job: Job) -> str:
    """The setting of remat that is fastest among those that fit, and of equally fast ones the smallest; `full` if none fits."""
    fitting = [plan for plan in ladder_plans(job) if plan.fits]
    return min(fitting, key=lambda plan: (plan.speed.step, plan.memory.total)).job.remat if fitting else LADDER[-1]


class Change(NamedTuple):
    """Another value of one choice.

    Attributes:
      name: field of `Job`.
      value: that it takes.
    """

    name: str
    value: object


class Remedy(NamedTuple):
    """Changes that make a job fit, and the plan with them.

    Attributes:
      changes: none of which can be left out.
      plan: with them.
    """

    changes: tuple[Change, ...]
    plan: Plan


def changed(job: Job, changes: tuple[Change, ...]) -> Job | None:
    """The job with changes; `None` where they do not go together."""
    try:
        return dataclasses.replace(job, **{change.name: change.value for change in changes})  # type: ignore[arg-type]
    except InputError:
        return None
