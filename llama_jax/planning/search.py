"""The smallest changes that make a training fit into memory, by trying them all in closed form."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from llama_jax.model.remat import LADDER, parse_remat, saved_names
from llama_jax.planning.chips import Topology, common_topologies
from llama_jax.planning.job import Job, MeshSizes
from llama_jax.planning.memory import training_memory
from llama_jax.planning.plan import Change, Plan, Remedy, changed, ladder_plans, make_plan

_SPLITS = (1, 2, 4, 8)  # ways of `tensor` and `context` that are tried
_CHUNK_DIVISORS = (2, 4)  # of the loss chunk: smaller ones make products too narrow to be fast
_NARROWEST_CHUNK = 512  # tokens
_MOST_MICROBATCHES = 64
_FASTER = 0.98


class Outlook(NamedTuple):
    """What surrounds a plan.

    Attributes:
      ladder: the same job with every setting of remat, from the fastest to the smallest.
      remedies: for a job that does not fit.
      enough: where no remedy is, on more chips.
      faster: for a job that fits, other settings that are faster and fit too.
    """

    ladder: list[Plan]
    remedies: list[Remedy]
    enough: Plan | None
    faster: Remedy | None


def outlook(plan: Plan) -> Outlook:
    """The alternatives to a plan."""
    found = remedies(plan)
    enough = None if plan.fits or found else enough_chips(plan)
    return Outlook(ladder_plans(plan.job), found, enough, fastest(plan) if plan.fits else None)


def remedies(plan: Plan, most: int = 5) -> list[Remedy]:
    """Changes to a job that does not fit, each set without one that could be left out or taken less far, the fastest first.

    Tried together are `remat`, the number of micro-batches, the loss chunk, the type of the optimizer's moments, and the axes
    `fsdp`, `tensor` and `context` of the mesh; where nothing of that is enough, the same with Adafactor, which learns
    differently.

    Args:
      plan: that does not fit; one that does has no remedies.
      most: how many to give.
    """
    if plan.fits:
        return []
    choices = _choices(plan.job)
    found = _smallest(plan, choices)
    if not found and plan.job.optimizer != "adafactor" and not plan.job.rank:
        found = _smallest(plan, [*choices[:-2], [Change("optimizer", "adafactor")], choices[-1]])
    return sorted(found, key=lambda remedy: (_pace(remedy), len(remedy.changes)))[:most]


def _pace(remedy: Remedy) -> float:
    """Seconds a token: on another mesh an update may have other rows."""
    return remedy.plan.speed.step / remedy.plan.job.tokens


def _smallest(plan: Plan, choices: list[Sequence[Change | None]]) -> list[Remedy]:
    """Of all sets of changes that make a job fit, those that are not more of another one."""
    found: dict[tuple[int, ...], Remedy] = {}
    for levels in itertools.product(*(range(len(steps)) for steps in choices)):
        if any(_less(smaller, levels) for smaller in found):
            continue
        remedy = _remedy(plan, [steps[level] for steps, level in zip(choices, levels)])
        if remedy is not None:
            found[levels] = remedy
    return [remedy for levels, remedy in found.items() if not any(_less(other, levels) for other in found)]


def _choices(job: Job) -> list[Sequence[Change | None]]:
    """For each choice the changes to try, from none to the one that saves most."""
    return [
        [None, *[Change("remat", remat) for remat in LADDER if _keeps_less(remat, job.remat)]],
        [None, *[Change("microbatches", count) for count in _more_microbatches(job)]],
        [
            None,
            *[
                Change("loss_chunk", int(job.chunk_tokens) // divisor)
                for divisor in _CHUNK_DIVISORS
                if _wide_enough(job, divisor)
            ],
        ],
        [None, *([Change("moment_dtype", "bfloat16")] if _has_wide_mean(job) else [])],
        [None, *[Change("mesh", mesh) for mesh in _other_meshes(job)]],
    ]


def _keeps_less(remat: str, than: str) -> bool:
    if than == "none":
        return remat != "none"
    _, first, rest = parse_remat(than)
    names = saved_names(remat)
    return remat != "none" and names <= saved_names(rest) and names < saved_names(first)


def _more_microbatches(job: Job) -> list[int]:
    rows = job.rows // job.mesh.rows
    return [count for count in range(job.microbatches + 1, _MOST_MICROBATCHES + 1)
            if rows % count == 0 and count % job.microbatches == 0]  # fmt: skip


def _wide_enough(job: Job, divisor: int) -> bool:
    return job.chunk_tokens / divisor >= _NARROWEST_CHUNK


def _has_wide_mean(job: Job) -> bool:
    return job.moment_dtype == "float32" and job.optimizer != "adafactor"


def _other_meshes(job: Job) -> list[MeshSizes]:
    """Meshes with the weights split further or the work of a row shared: `data` as it is or 1, `fsdp` the rest."""
    chips, now = job.topology.chips, job.mesh
    pairs = [*((ways, now.context) for ways in _SPLITS), *((now.tensor, ways) for ways in _SPLITS)]
    found = []
    for data in dict.fromkeys((now.data, job.topology.slices, 1)):
        for tensor, context in dict.fromkeys(pairs):
            if chips % (data * tensor * context) == 0:
                found.append(MeshSizes(data, chips // (data * tensor * context), tensor, context))
    # A wish for `tensor` or `context` is not taken back.
    return [mesh for mesh in found if mesh != now and mesh.tensor >= now.tensor and mesh.context >= now.context]


def _remedy(plan: Plan, picked: Sequence[Change | None]) -> Remedy | None:
    """A job with changes; `None` where they do not go together or it still does not fit."""
    changes = _together(plan.job, tuple(change for change in picked if change is not None))
    job = changed(plan.job, changes)
    if job is None or training_memory(job).total > plan.limit:
        return None
    return Remedy(changes, make_plan(job, plan.limit))


def _together(job: Job, changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """The changes, with what follows from them: Adafactor has no mean of the gradient."""
    has_adafactor = Change("optimizer", "adafactor") in changes
    return (*changes, Change("moment_dtype", "float32")) if has_adafactor and job.moment_dtype != "float32" else changes


def fastest(plan: Plan) -> Remedy | None:
    """Another `remat` and number of micro-batches with which a job fits and is at least 2 % faster, if there is one."""
    job, found = plan.job, []
    for remat, count in itertools.product(LADDER, (job.microbatches, *_more_microbatches(job))):
        other = {"remat": remat, "microbatches": count}
        changes = tuple(Change(name, value) for name, value in other.items() if value != getattr(job, name))
        remedy = _remedy(plan, changes)
        if remedy is not None and remedy.plan.speed.step < _FASTER * plan.speed.step:
            found.append(remedy)
    return min(found, key=lambda remedy: (remedy.plan.speed.step, remedy.plan.memory.total), default=None)


def enough_chips(plan: Plan) -> Plan | None:
    """A plan on the smallest common topology of the same chip on which a job fits when as little as possible is kept.

    That is: of a layer only its input, one row a chip at a time, weights split over all chips, products over up to 8 of them;
    `None` where no topology is large enough.
    """
    job = plan.job
    for topology in common_topologies(job.topology.chip):
        for tensor in _SPLITS if topology.chips > job.topology.chips else ():
            larger = _on_chips(job, topology, tensor)
            if larger is not None and make_plan(larger).fits:
                return make_plan(larger)
    return None


def _on_chips(job: Job, topology: Topology, tensor: int) -> Job | None:
    if topology.chips % tensor:
        return None
    mesh = MeshSizes(fsdp=topology.chips // tensor, tensor=tensor)
    rows = -(-job.rows // mesh.rows) * mesh.rows
    values = {"topology": topology, "mesh": mesh, "rows": rows, "microbatches": rows // mesh.rows, "remat": LADDER[-1]}
    return changed(job, tuple(Change(name, value) for name, value in values.items()))


def _less(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one set of changes is a smaller one of the same kind: nothing goes further, meshes are equal or untouched."""
    *steps, mesh = one
    *others, other_mesh = other
    return one != other and mesh in (0, other_mesh) and all(a <= b for a, b in zip(steps, others))
