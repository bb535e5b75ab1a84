"""`plan`: memory and time of a training, or of decoding, on chips that are not rented yet; nothing
is run.
"""

import argparse
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.cli.options import OptionParser, count, given_options
from llama_jax.cli.plan_report import (
    Rows,
    decode_json,
    decode_lines,
    gb,
    remedies_json,
    remedy_lines,
    training_json,
    training_lines,
)
from llama_jax.cli.writing import as_json, note, prepare_output
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.formatting import duration
from llama_jax.model.remat import REMAT_POLICIES
from llama_jax.parallel.chips import CHIPS, Topology, parse_topology
from llama_jax.planning.cost_model import CALIBRATION, Prediction, predict_round, sizes
from llama_jax.planning.job import OPTIMIZERS, Job, MeshSizes, parse_mesh
from llama_jax.planning.plan import (
    TRAIN_KEYS,
    Plan,
    best_remat,
    first_fitting_remat,
    job_of,
    leaves_room,
    make_plan,
    outlook,
    remat_candidates,
)
from llama_jax.planning.speed import DecodePlan, make_decode_plan
from llama_jax.presets import preset
from llama_jax.training.config import ComputeConfig, TrainConfig

if TYPE_CHECKING:
    from llama_jax.planning.compile import Compiled


# --- plan compiled ---
#
# `plan --compile`: the step compiled for chips that are not here, in words and as JSON.


_ESTIMATE = "from the compiler's own estimates, not measured"
_SHOWN = 3  # copies that are told one by one


def compiled_training(plans: Sequence[Plan], config: TrainConfig | None) -> tuple[Rows, dict]:
    """Compiles the training steps of plans in turn until one leaves 5 % of the memory; rows of
    text, and the same as figures.

    Args:
      plans: in closed form: one, or those of the settings that `remat: auto` may stand for.
      config: of the run, where there is one: the step is then the one that `train.py` would run.

    Raises:
      InputError: for what cannot be compiled here.
    """
    _prepare()
    from llama_jax.planning.compile import require_whole

    require_whole(plans[0].job)
    _announce(plans[0].job.topology)
    tried: Rows = []
    for plan, following in itertools.zip_longest(plans, plans[1:]):
        step = _compile(plan.job, config)
        needed = (
            _state(plan) + step if isinstance(step, float) else step.arguments + step.temporaries
        )
        if following is None or leaves_room(needed, plan.limit):
            break
        takes = (
            f"remat {plan.job.remat} takes {gb(needed)} of {gb(plan.limit)} a chip, more than 95 %"
        )
        words = f"{takes}; {following.job.remat} is next"
        tried.append(("compiled", words))
    tried += [("remat", f"{plan.job.remat}, as compiled")] if len(plans) > 1 else []
    rows, figures = _told(plan, step)
    return tried + rows, {"remat": plan.job.remat, **figures}


def _compile(job: Job, config: TrainConfig | None) -> "Compiled | float":
    from llama_jax.planning.compile import compile_config, compile_training

    return _attempt(
        lambda: compile_training(job) if config is None else compile_config(config, job)
    )


def _told(plan: Plan, step: "Compiled | float") -> tuple[Rows, dict]:
    """What the compiler made of a plan."""
    if isinstance(step, float):
        return _too_large(plan, step)
    job = plan.job
    rows, figures = _memory(step, plan.limit, "state and batch", plan.memory.total)
    if not figures["fits"]:
        more, remedies = _instead(plan, figures["total"])
        rows, figures = rows + more, figures | {"remedies": remedies}
    times = step.prediction
    if times is None:
        return [
            *rows,
            ("predicted", f"nothing: the clock of {job.topology.chip.name} is not known"),
        ], figures
    if times.unknown_loops:
        return [
            *rows,
            (
                "predicted",
                f"nothing: {times.unknown_loops} loops of the program have no known length",
            ),
        ], figures
    shares = times.shares(step.flops, job.topology.chip.peak)
    rows += [
        (
            "predicted",
            f"{duration(times.simulated)} a step, causal MFU {shares[2]:.1%} "
            f"({shares[0]:.1%} by compute alone, "
            f"{shares[1]:.1%} with synchronous transfers); "
            f"{job.tokens / times.simulated:,.0f} tokens/s",
        ),
        ("", f"{_ESTIMATE}: {CALIBRATION}"),
        ("transfers", _transfers(times)),
        ("copies", _copies(times)),
    ]
    names = ("compute", "synchronous", "simulated")
    predicted = times._asdict() | {"mfu": dict(zip(names, shares)), "calibration": CALIBRATION}
    return rows, figures | {"predicted": predicted}


def compiled_decoding(
    config: LlamaConfig, plan: DecodePlan, dtype: str, cache_dtype: str
) -> tuple[Rows, dict]:
    """Compiles the decoding step of a plan; rows of text, and the same as figures.

    Raises:
      InputError: for what cannot be compiled here.
    """
    _prepare()
    from llama_jax.planning.compile import compile_decoding

    _announce(plan.topology)
    step = _attempt(lambda: compile_decoding(config, plan, dtype, cache_dtype))
    if isinstance(step, float):
        words = f"does not fit: {gb(step)} of temporaries alone, of {gb(plan.limit)} a chip"
        return [("compiled", words)], {"fits": False, "temporaries": step, "limit": plan.limit}
    rows, figures = _memory(step, plan.limit, "weights and cache", plan.total)
    greedy = step.prediction
    if greedy is None:
        return [
            *rows,
            ("predicted", f"nothing: the clock of {plan.topology.chip.name} is not known"),
        ], figures
    drawn = predict_round(step.text, plan.topology, longest=True)
    count = sum(greedy.collectives.values())
    rows += [
        (
            "predicted",
            f"{duration(greedy.simulated)} a step, {plan.batch / greedy.simulated:,.1f} tokens/s, "
            f"{plan.step / greedy.simulated:.0%} of the limit; "
            f"{duration(drawn.simulated)} with top-k or top-p",
        ),
        ("", f"{_ESTIMATE}, and compared with no decoding that was"),
        (
            "transfers",
            f"{_transfers(greedy)}; each microsecond until one begins adds "
            f"{duration(count * 1e-6)}",
        ),
    ]
    predicted = greedy._asdict() | {
        "share_of_limit": plan.step / greedy.simulated,
        "simulated_drawn": drawn.simulated,
    }
    return rows, figures | {"predicted": predicted}


def _prepare() -> None:
    """The compiler for TPUs on a machine without one, which opens no device: what its library looks
    at when it is loaded.
    """
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server which machine this is
        # and does not complain that nobody says so: what is compiled for is given
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # takes no lock
        "JAX_PLATFORMS": "cpu",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _announce(topology: Topology) -> None:
    """Says what is going to take so long, once it is known that programs can be compiled for these
    chips here.
    """
    from llama_jax.planning.compile import topology_devices

    topology_devices(topology)
    note(f"compiling the step for {topology.name}, which takes minutes")


def _attempt(compile_step: Callable[[], "Compiled"]) -> "Compiled | float":
    """The compiled step; or bytes of its temporaries, where the compiler says that they are too
    many.
    """
    import jax

    from llama_jax.planning.compile import too_large

    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # it could be written, but not read without a device
    try:
        return compile_step()
    except jax.errors.JaxRuntimeError as error:
        temporaries = too_large(error)
        if temporaries is None:
            raise
        return temporaries


def _memory(step: "Compiled", limit: float, what: str, closed: float) -> tuple[Rows, dict]:
    total = step.arguments + step.temporaries
    parts = f"{gb(step.arguments)} of {what} + {gb(step.temporaries)} of temporaries = {gb(total)}"
    verdict = "fits" if total <= limit else f"does not fit: {gb(total - limit)} too many"
    compared = f"the closed form says {gb(closed)} ({closed / total - 1:+.0%})"
    figures = {
        "seconds": step.seconds,
        "arguments": step.arguments,
        "temporaries": step.temporaries,
        "total": total,
        "limit": limit,
        "closed_form": closed,
        "fits": total <= limit,
    }
    return [
        ("compiled", f"in {step.seconds:.0f} s: {verdict}; a chip has {gb(limit)}"),
        ("", f"{parts}; {compared}"),
    ], figures


def _state(plan: Plan) -> float:
    return plan.memory.parameters + plan.memory.optimizer


def _too_large(plan: Plan, temporaries: float) -> tuple[Rows, dict]:
    """A step that the compiler gave up: its temporaries are known, its state in closed form."""
    state = _state(plan)
    total = state + temporaries
    row = (
        "compiled",
        f"does not fit: {gb(state)} of state + {gb(temporaries)} of temporaries = "
        f"{gb(total)}; a chip has {gb(plan.limit)}",
    )
    more, remedies = _instead(plan, total)
    figures = {
        "fits": False,
        "temporaries": temporaries,
        "total": total,
        "limit": plan.limit,
        "remedies": remedies,
    }
    return [row, *more], figures


def _instead(plan: Plan, total: float) -> tuple[Rows, list[dict]]:
    """Changes with which the compiled step should fit, by the closed form, taken to be as much too
    small as it was.
    """
    smaller = plan._replace(limit=plan.limit * plan.memory.total / total)
    around = outlook(smaller)
    note = (
        f", {gb(smaller.limit)} by closed form, where the compiler needs "
        f"{total / plan.memory.total:.2f} times as much"
    )
    return remedy_lines(smaller, around, note), remedies_json(around, plan.job)


def _transfers(times: Prediction) -> str:
    parts = [
        f"{count} x {kind} ({gb(times.moved[kind])})"
        for kind, count in sorted(times.collectives.items())
    ]
    return ", ".join(parts) or "none"


def _copies(times: Prediction) -> str:
    """How many copies there are in loops, and what the largest are."""
    if not times.copies:
        return "none of 1 MiB or more in loops"
    bytes_of = {what: count * max(sizes(what), default=0.0) for what, count in times.copies.items()}
    largest = sorted(bytes_of, key=lambda what: -bytes_of[what])[:_SHOWN]
    shown = ", ".join(
        f"{times.copies[what]} x {re.sub(r'[{(].*', '', what.replace('(', ''))}" for what in largest
    )
    total = gb(sum(bytes_of.values()))
    return (
        f"{sum(times.copies.values())} of 1 MiB or more in loops, {total} in all; the "
        f"largest: {shown}"
    )


# --- plan ---


_FLOATS = ("float32", "bfloat16")
_TRAINING, _DECODING = "the training", "decoding in place of training"  # groups of options
_OVERRIDES = ("model", "run.init")  # of a config
_WITH_CONFIG = (
    "config",
    *_OVERRIDES,
    "topology",
    "tokens",
    "json",
    "compile",
)  # a config says all the others


def make_parser(prog: str) -> OptionParser:
    """The options of `plan`."""
    parser = OptionParser(
        prog,
        "Memory and time of a training or of decoding in closed form, before anything is rented.",
    )
    parser.add_argument(
        "--model", metavar="PRESET", help="a published architecture, such as llama3.1-70b"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a training's YAML file in place of all choices"
    )
    parser.add_argument(
        "--run.init",
        metavar="PATH",
        help="with --config: the model on disk with which the training begins",
    )
    names = ", ".join(chip.name for chip in CHIPS)
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CHIPS",
        help=f"v5p:4x4x8, 2xv5p:4x4x8 (two slices), h100:8; of {names}",
    )
    _add(
        parser,
        "length",
        type=count,
        metavar="T",
        help="tokens of a row; the model's context, but at most 8192",
    )
    axes = (
        "such as fsdp=64,tensor=2, of data, fsdp, tensor, context; by default fsdp takes all "
        "of a slice"
    )
    parser.add_argument("--mesh", metavar="SIZES", help=axes)
    for axis in MeshSizes._fields:
        parser.add_argument(
            f"--mesh.{axis}", metavar="N", help=f"size of {axis}, before what --mesh says"
        )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    ahead = (
        "compile the step of the training, or of decoding, for the TPUs, on this machine: "
        "true memory, predicted time (minutes)"
    )
    parser.add_argument("--compile", action="store_true", help=ahead)
    add_training_options(parser)
    group = parser.add_argument_group(_DECODING)
    group.add_argument("--decode", action="store_true", help="plan the generation of text")
    group.add_argument(
        "--batch",
        type=count,
        metavar="B",
        help="rows at a time, all chips together; 1 a copy of the model",
    )
    group.add_argument("--quantize", choices=("int8", "int4"), help="narrow weights")
    group.add_argument(
        "--cache-dtype", choices=("bfloat16", "int8"), default="bfloat16", help="of keys and values"
    )
    return parser


def _add(group: argparse._ActionsContainer, field: str, **given: Any) -> None:
    """An option for a field of `Job`, by a short name and by the key of a training's config."""
    short = {"base_dtype": "base"}.get(field, field)
    group.add_argument(
        f"--{short.replace('_', '-')}", f"--{TRAIN_KEYS[field]}", dest=field, **given
    )


def add_training_options(parser: OptionParser) -> None:
    """What a training's memory and time depend on, under short names and under those of its
    config.
    """
    group = parser.add_argument_group(_TRAINING)
    rounded = (
        "of an update, such as 4M, rounded to whole rows a chip; one row a chip and micro-batch"
    )
    group.add_argument("--batch-tokens", type=count, metavar="N", help=rounded)
    _add(
        group,
        "microbatches",
        type=count,
        default=1,
        metavar="A",
        help="into which an update is cut",
    )
    kept = "a rung from none to full, names joined by +, or auto: the fastest that fits"
    _add(group, "remat", default="auto", metavar="NAMES", help=kept)
    _add(group, "optimizer", choices=OPTIMIZERS, default="adamw", help="that makes the updates")
    _add(
        group,
        "moment_dtype",
        choices=_FLOATS,
        default="float32",
        help="of the mean of the gradient",
    )
    _add(
        group,
        "param_dtype",
        choices=_FLOATS,
        default="float32",
        help="of the parameters that are trained",
    )
    chunk = "tokens of one chip whose logits exist at one time"
    _add(group, "loss_chunk", type=count, default=ComputeConfig.loss_chunk, metavar="N", help=chunk)
    _add(
        group,
        "rank",
        type=count,
        metavar="R",
        help="train adapters (LoRA) of this rank over a frozen model",
    )
    _add(
        group,
        "base_dtype",
        choices=(*_FLOATS, "int8", "int4"),
        default="bfloat16",
        help="of the model under adapters",
    )
    group.add_argument(
        "--tokens", type=count, metavar="D", help="to be trained on, such as 15T: how many days"
    )


def mesh_text(options: argparse.Namespace) -> str | None:
    """What `--mesh` and `--mesh.AXIS` say together, the latter winning."""
    given = dict(
        part.partition("=")[::2]
        for part in (options.mesh or "").replace("*", ",").split(",")
        if part
    )
    axes = {axis: getattr(options, f"mesh.{axis}") for axis in MeshSizes._fields}
    given |= {axis: size for axis, size in axes.items() if size is not None}
    return ",".join(f"{axis}={size}" for axis, size in given.items()) or None


def make_job(
    options: argparse.Namespace, config: LlamaConfig, topology: Topology, length: int
) -> Job:
    """The training that the options describe.

    Raises:
      InputError: for choices that do not go together.
    """
    if options.moment_dtype != "float32" and options.optimizer == "adafactor":
        raise InputError(
            "--moment-dtype bfloat16 given; adafactor keeps no mean of the gradient: leave it out"
        )
    mesh = parse_mesh(mesh_text(options), topology)
    unit = mesh.sequences * options.microbatches
    rows = unit * max(1, round((options.batch_tokens or 0) / length / unit))
    job = Job(
        config,
        topology,
        mesh,
        length,
        rows,
        options.microbatches,
        "full" if options.remat == "auto" else options.remat,
        options.optimizer,
        options.moment_dtype,
        options.param_dtype,
        loss_chunk=options.loss_chunk,
        rank=options.rank or 0,
        base_dtype=options.base_dtype,
    )
    return dataclasses.replace(job, remat=best_remat(job)) if options.remat == "auto" else job


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The training that a YAML file describes, with the architecture of the model that it begins
    with, where that is here.

    Nothing is fetched: where that model is not here, a line on stderr says so, and the numbers
    under `model` are taken.

    Args:
      path: of the file.
      overrides: as `train.py` takes them.

    Raises:
      InputError: for a file that is no config, or gives no model.
    """
    from llama_jax.cli.arguments import parse_train

    absent: list[str] = []

    def architecture(init: str) -> LlamaConfig | None:
        """Of the model at a path, its weights unread."""
        if not os.path.exists(init):
            absent.append(f"run.init: {init} is not here")
            return None
        from llama_jax.weights.open import open_model

        return open_model(init).source.config

    try:
        config = parse_train(["--config", str(path), *overrides], path, architecture)
    except InputError as error:
        if not absent:
            raise
        raise InputError(f"{absent[0]}; {error}") from None
    for words in absent:
        note(f"{words}; the architecture is that of the key model")
    return config


def config_job(config: TrainConfig, topology: Topology) -> Job:
    """A config's training on chips, its `compute.remat: auto` resolved for them.

    Raises:
      InputError: for chips that it does not fit.
    """
    job = job_of(config, topology)
    return (
        dataclasses.replace(job, remat=first_fitting_remat(job))
        if config.compute.remat == "auto"
        else job
    )


def require_alone(arguments: list[str]) -> None:
    """Refuses choices beside a config, which says them all.

    Raises:
      InputError: naming the first.
    """
    other = next(
        (word for word in given_options(arguments) if word.removeprefix("--") not in _WITH_CONFIG),
        None,
    )
    if other is not None:
        raise InputError(
            f"{other} given beside --config; change the file, or give --model and all "
            "choices without it"
        )


def require_used(parser: OptionParser, arguments: list[str]) -> None:
    """Refuses choices that there is no use for: of decoding beside a training, the other way round,
    of a config.

    Raises:
      InputError: naming the first.
    """
    given = given_options(arguments)
    if "--run.init" in given:
        raise InputError(
            "--run.init given without --config, which it belongs to; add --config FILE, "
            "or leave it out"
        )
    if "--decode" in given:
        useless, words = (
            _TRAINING,
            "beside --decode, which has no use for it; leave out one of them",
        )
    else:
        useless, words = (
            _DECODING,
            "without --decode, which it belongs to; add --decode, or leave it out",
        )
    used = next((word for word in given if word in parser.options_of(useless)), None)
    if used is not None:
        raise InputError(f"{used} given {words}")


def _decoding(
    options: argparse.Namespace, config: LlamaConfig, topology: Topology
) -> tuple[list, dict]:
    text = mesh_text(options)
    length, dtype = (
        options.length or min(config.context_length, 8192),
        options.quantize or "bfloat16",
    )
    mesh = parse_mesh(text, topology) if text else None
    plan = make_decode_plan(
        config, topology, options.batch, length, dtype, options.cache_dtype, mesh
    )
    rows, figures = decode_lines(options.model, plan, dtype), decode_json(plan)
    if not options.compile:
        return rows, figures
    more, compiled = compiled_decoding(config, plan, dtype, options.cache_dtype)
    return rows + more, figures | {"compiled": compiled}


def compiled_in_turn(job: Job, auto: bool, config: TrainConfig | None) -> list[Plan]:
    """The plans to compile until one fits: for `remat: auto` every setting that it may stand for,
    else the one.

    Args:
      job: whose `remat` is what `auto` stands for by closed form.
      auto: whether it was to be found.
      config: of the run, where there is one: then those that `train.py` tries, else `job` and what
        keeps less.
    """
    below = REMAT_POLICIES[REMAT_POLICIES.index(job.remat) :] if auto else ()
    remats = below if config is None else remat_candidates(job) if auto else ()
    return [make_plan(dataclasses.replace(job, remat=remat)) for remat in remats or (job.remat,)]


def _training(
    options: argparse.Namespace, name: str, job: Job, config: TrainConfig | None = None
) -> tuple[list, dict]:
    plan = make_plan(job)
    around = outlook(plan)
    given = (plan, around, options.tokens, options.batch_tokens)
    rows, figures = training_lines(name, *given), training_json(*given)
    if not options.compile:
        return rows, figures
    auto = (options.remat if config is None else config.compute.remat) == "auto"
    more, compiled = compiled_training(compiled_in_turn(job, auto, config), config)
    return rows + more, figures | {"compiled": compiled}


def main(arguments: list[str], prog: str = "plan") -> int:
    """Runs `plan` and returns its exit status: 0 also where a job does not fit, which is an
    answer.
    """
    parser = make_parser(prog)
    options = parser.parse(arguments)
    topology = parse_topology(options.topology)
    if options.config is not None:
        require_alone(arguments)
        changes = [
            f"--{key}={value}" for key in _OVERRIDES if (value := getattr(options, key)) is not None
        ]
        name, run = str(options.config), read_config(options.config, changes)
        rows, figures = _training(options, name, config_job(run, topology), run)
    elif options.model is None:
        raise InputError("the following arguments are required: --model (or --config); see --help")
    else:
        require_used(parser, arguments)
        name, config = options.model, preset(options.model)
        length = options.length or min(config.context_length, 8192)
        rows, figures = (
            _decoding(options, config, topology)
            if options.decode
            else _training(options, name, make_job(options, config, topology, length))
        )
    prepare_output(json=options.json)
    if options.json:
        print(as_json({"model": name, "topology": topology.name, **figures}))
    else:
        print("\n".join(f"{name:14}{text}".rstrip() for name, text in rows))
    return 0
