"""A plan: memory and speed of a job, the setting of remat that suits it, and what to change where
it does not fit.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from llama_jax.errors import InputError
from llama_jax.model.remat import REMAT_POLICIES, parse_remat, saved_names
from llama_jax.parallel.chips import Chip, Topology, chip_of, common_topologies
from llama_jax.planning.job import Job, MeshSizes
from llama_jax.planning.memory import Memory, training_memory
from llama_jax.planning.speed import Speed, training_speed
from llama_jax.training.config import TrainConfig


class Plan(NamedTuple):
    """A job, and its cost.

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
    return Plan(
        job,
        training_memory(job),
        training_speed(job),
        job.topology.chip.memory if limit is None else limit,
    )


def remat_plans(job: Job) -> list[Plan]:
    """The plans of a job for every setting of remat, from the fastest to the smallest."""
    return [make_plan(dataclasses.replace(job, remat=remat)) for remat in REMAT_POLICIES]


def best_remat(job: Job) -> str:
    """The setting of remat that is fastest among those that fit, and of equally fast ones the
    smallest; `full` if none fits.
    """
    fitting = [plan for plan in remat_plans(job) if plan.fits]
    return (
        min(fitting, key=lambda plan: (plan.speed.step, plan.memory.total)).job.remat
        if fitting
        else REMAT_POLICIES[-1]
    )


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


# --- of config ---
#
# From a training's config to a plan's job, and the setting of remat that `compute.remat: auto`
# stands for.


# Any chip whose figures are not known: its memory is what the job seems to need, so that it has to
# need less.
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
    mesh = MeshSizes(
        **{axis: topology.chips // known if size == -1 else size for axis, size in sizes.items()}
    )
    dtype = compute_dtype if config.compute.dtype == "auto" else config.compute.dtype
    base = config.adapter.base
    return Job(
        config.model,
        topology,
        mesh,
        length=config.data.length,
        sequences=config.data.batch_size,
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
    """The remat policy with the least recomputation that fits into 95 % of a chip's
    memory.

    `full` where none fits, and where the memory is not known.

    Args:
      job: the training, whatever its own `remat`.
      memory: bytes of one chip, where they are known better than by the table of chips.
    """
    limit = _SHARE * (memory or job.topology.chip.memory)
    fitting = (
        remat
        for remat in REMAT_POLICIES
        if make_plan(dataclasses.replace(job, remat=remat), limit).fits
    )
    return next(fitting, REMAT_POLICIES[-1])


def remat_candidates(
    job: Job, memory: float | None = None, before: str | None = None
) -> tuple[str, ...]:
    """What `compute.remat: auto` may stand for, in the order in which to ask the compiler; the last
    need not be asked.

    The policy that the run had before, then the policies that fit into the whole memory by the
    closed form, which may be some percent too large. `full` is always the last. If the memory is
    not known: the policy before, else `full`.

    Args:
      job: the training.
      memory: bytes of one chip, where they are known.
      before: setting of remat with which the run was trained so far, if it was.
    """
    limit, earlier = memory or job.topology.chip.memory, [before] if before else []
    if not limit:
        return (before or REMAT_POLICIES[-1],)
    fitting = [
        remat
        for remat in (*earlier, *REMAT_POLICIES)
        if make_plan(dataclasses.replace(job, remat=remat), limit).fits
    ]
    once = list(dict.fromkeys((*fitting, REMAT_POLICIES[-1])))
    return tuple(once[: once.index(REMAT_POLICIES[-1]) + 1])


def leaves_room(needed: float, limit: float) -> bool:
    """Whether the bytes that a compiled step needs are at most 95 % of a chip's."""
    return needed <= _SHARE * limit


# --- search ---
#
# The smallest changes that make a training fit into memory, by trying them all in closed form.


_SPLITS = (1, 2, 4, 8)  # ways of `tensor` and `context` that are tried
_CHUNK_DIVISORS = (2, 4)  # of the loss chunk: smaller ones make matmuls too small to be fast
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
    return Outlook(remat_plans(plan.job), found, enough, fastest(plan) if plan.fits else None)


def remedies(plan: Plan, most: int = 5) -> list[Remedy]:
    """Changes to a job that does not fit, each set without one that could be left out or taken less
    far, the fastest first.

    Tried together are `remat`, the number of micro-batches, the loss chunk, the type of the
    optimizer's moments, and the axes `fsdp`, `tensor` and `context` of the mesh; where nothing of
    that is enough, the same with Adafactor, which learns differently.

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
    """Seconds a token: on another mesh an update may have other sequences."""
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
    return [
        remedy
        for levels, remedy in found.items()
        if not any(_less(other, levels) for other in found)
    ]


def _choices(job: Job) -> list[Sequence[Change | None]]:
    """For each choice the changes to try, from none to the one that saves most."""
    return [
        [
            None,
            *[Change("remat", remat) for remat in REMAT_POLICIES if _keeps_less(remat, job.remat)],
        ],
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
    sequences = job.sequences // job.mesh.sequences
    return [
        count
        for count in range(job.microbatches + 1, _MOST_MICROBATCHES + 1)
        if sequences % count == 0 and count % job.microbatches == 0
    ]


def _wide_enough(job: Job, divisor: int) -> bool:
    return job.chunk_tokens / divisor >= _NARROWEST_CHUNK


def _has_wide_mean(job: Job) -> bool:
    return job.moment_dtype == "float32" and job.optimizer != "adafactor"


def _other_meshes(job: Job) -> list[MeshSizes]:
    """Meshes with the weights split further or the work of a sequence shared: `data` as it is or 1,
    `fsdp` the rest.
    """
    chips, now = job.topology.chips, job.mesh
    pairs = [*((ways, now.context) for ways in _SPLITS), *((now.tensor, ways) for ways in _SPLITS)]
    found = []
    for data in dict.fromkeys((now.data, job.topology.slices, 1)):
        for tensor, context in dict.fromkeys(pairs):
            if chips % (data * tensor * context) == 0:
                found.append(MeshSizes(data, chips // (data * tensor * context), tensor, context))
    # A given `tensor` or `context` is kept.
    return [
        mesh
        for mesh in found
        if mesh != now and mesh.tensor >= now.tensor and mesh.context >= now.context
    ]


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
    return (
        (*changes, Change("moment_dtype", "float32"))
        if has_adafactor and job.moment_dtype != "float32"
        else changes
    )


def fastest(plan: Plan) -> Remedy | None:
    """Another `remat` and number of micro-batches with which a job fits and is at least 2 % faster,
    if there is one.
    """
    job, found = plan.job, []
    for remat, count in itertools.product(
        REMAT_POLICIES, (job.microbatches, *_more_microbatches(job))
    ):
        other = {"remat": remat, "microbatches": count}
        changes = tuple(
            Change(name, value) for name, value in other.items() if value != getattr(job, name)
        )
        remedy = _remedy(plan, changes)
        if remedy is not None and remedy.plan.speed.step < _FASTER * plan.speed.step:
            found.append(remedy)
    return min(
        found, key=lambda remedy: (remedy.plan.speed.step, remedy.plan.memory.total), default=None
    )


def enough_chips(plan: Plan) -> Plan | None:
    """A plan on the smallest common topology of the same chip on which a job fits when as little as
    possible is kept.

    That is: of a layer only its input, one sequence a chip at a time, weights split over all chips,
      products over up to 8 of them;
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
    sequences = -(-job.sequences // mesh.sequences) * mesh.sequences
    values = {
        "topology": topology,
        "mesh": mesh,
        "sequences": sequences,
        "microbatches": sequences // mesh.sequences,
        "remat": REMAT_POLICIES[-1],
    }
    return changed(job, tuple(Change(name, value) for name, value in values.items()))


def _less(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one set of changes is a smaller one of the same kind: nothing goes further, meshes
    are equal or untouched.
    """
    *steps, mesh = one
    *others, other_mesh = other
    return one != other and mesh in (0, other_mesh) and all(a <= b for a, b in zip(steps, others))


# --- flags ---
#
# Changes to a job as they are typed: keys of a training's config, which `plan` takes too.


# Keys of a training's config by the fields of a job; each axis of the mesh has a key of its own.
TRAIN_KEYS: Mapping[str, str] = {
    "length": "data.length",
    "remat": "compute.remat",
    "microbatches": "data.accumulation",
    "loss_chunk": "compute.loss_chunk",
    "optimizer": "optimizer.name",
    "moment_dtype": "optimizer.moments_dtype",
    "param_dtype": "optimizer.param_dtype",
    "rank": "adapter.rank",
    "base_dtype": "adapter.base",
}


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


# --- advice ---
#
# Advice for a training that has run out of memory: what to change in its config, from the same
# search as a plan.


_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OOM when allocating", re.IGNORECASE)
_WANTED = re.compile(r"allocat\w*\s+([0-9][0-9.,]*)\s*([KMGT]i?B|bytes)", re.IGNORECASE)
_UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_LESS = 0.9  # of the estimated need of a job that did not fit


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
      job: the training, see `llama_jax.planning.plan.job_of`.
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
        return [
            *lines,
            "no setting of compute.remat, data.accumulation, compute.loss_chunk or the "
            "mesh saves enough: "
            "use more devices, adapters (adapter.rank), shorter sequences (data.length) "
            "or a smaller model",
        ]
    return [
        *lines,
        *[f"{'or' if i else 'try'} {_remedy_line(remedy, plan)}" for i, remedy in enumerate(found)],
    ]


def _remedy_line(remedy: Remedy, plan: Plan) -> str:
    speed = remedy.plan.speed
    times = plan.speed.tokens_per_second / speed.tokens_per_second
    typed = flags(remedy, plan.job)
    return (
        f"{typed}: {_gigabytes(remedy.plan.memory.total)} a device, {times:.2f} times the "
        "time of a step"
    )


def _need_line(plan: Plan, limit: float) -> str:
    parts = plan.memory._asdict()
    largest = sorted(parts, key=lambda name: -parts[name])[:2]
    words = " and ".join(f"{name} {_gigabytes(parts[name])}" for name in largest)
    known = f" of {_gigabytes(limit)}" if limit else ""
    return (
        f"by the closed form this training needs {_gigabytes(plan.memory.total)}{known} a "
        f"device, most of it {words}"
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
