"""`plan --compile`: the step compiled for chips that are not here, in words and as JSON."""

import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llama_jax.cli.plan_json import remedies_json
from llama_jax.cli.plan_text import Rows, duration, gb, remedy_lines
from llama_jax.cli.writing import note
from llama_jax.config import LlamaConfig
from llama_jax.planning.chips import Topology
from llama_jax.planning.decode import DecodePlan
from llama_jax.planning.hlo import sizes
from llama_jax.planning.job import Job
from llama_jax.planning.of_config import leaves_room
from llama_jax.planning.plan import Plan
from llama_jax.planning.ruler import CALIBRATION, Prediction, predict_round
from llama_jax.planning.search import outlook
from llama_jax.training.config import TrainConfig

if TYPE_CHECKING:
    from llama_jax.planning.ahead import Compiled

_ESTIMATE = "from the compiler's own estimates, not measured"
_SHOWN = 3  # copies that are told one by one


def compiled_training(plans: Sequence[Plan], config: TrainConfig | None) -> tuple[Rows, dict]:
    """Compiles the training steps of plans in turn until one leaves 5 % of the memory; rows of text, and the same as figures.

    Args:
      plans: in closed form: one, or those of the settings that `remat: auto` may stand for.
      config: of the run, where there is one: the step is then the one that `train.py` would run.

    Raises:
      InputError: for what cannot be compiled here.
    """
    _prepare()
    from llama_jax.planning.ahead import require_whole

    require_whole(plans[0].job)
    _announce(plans[0].job.topology)
    tried: Rows = []
    for plan, following in itertools.zip_longest(plans, plans[1:]):
        step = _compile(plan.job, config)
        needed = _state(plan) + step if isinstance(step, float) else step.arguments + step.temporaries
        if following is None or leaves_room(needed, plan.limit):
            break
        takes = f"remat {plan.job.remat} takes {gb(needed)} of {gb(plan.limit)} a chip, more than 95 %"
        words = f"{takes}; {following.job.remat} is next"
        tried.append(("compiled", words))
    tried += [("remat", f"{plan.job.remat}, as compiled")] if len(plans) > 1 else []
    rows, figures = _told(plan, step)
    return tried + rows, {"remat": plan.job.remat, **figures}


def _compile(job: Job, config: TrainConfig | None) -> "Compiled | float":
    from llama_jax.planning.ahead import compile_config, compile_training

    return _attempt(lambda: compile_training(job) if config is None else compile_config(config, job))


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
        return [*rows, ("predicted", f"nothing: the clock of {job.topology.chip.name} is not known")], figures
    if times.unknown_loops:
        return [*rows, ("predicted", f"nothing: {times.unknown_loops} loops of the program have no known length")], figures
    shares = times.shares(step.flops, job.topology.chip.peak)
    rows += [
        ("predicted", f"{duration(times.simulated)} a step, causal MFU {shares[2]:.1%} ({shares[0]:.1%} by compute alone, "
                      f"{shares[1]:.1%} with synchronous transfers); {job.tokens / times.simulated:,.0f} tokens/s"),
        ("", f"{_ESTIMATE}: {CALIBRATION}"),
        ("transfers", _transfers(times)),
        ("copies", _copies(times)),
    ]  # fmt: skip
    names = ("compute", "synchronous", "simulated")
    predicted = times._asdict() | {"mfu": dict(zip(names, shares)), "calibration": CALIBRATION}
    return rows, figures | {"predicted": predicted}


def compiled_decoding(config: LlamaConfig, plan: DecodePlan, dtype: str, cache_dtype: str) -> tuple[Rows, dict]:
    """Compiles the decoding step of a plan; rows of text, and the same as figures.

    Raises:
      InputError: for what cannot be compiled here.
    """
    _prepare()
    from llama_jax.planning.ahead_decode import compile_decoding

    _announce(plan.topology)
    step = _attempt(lambda: compile_decoding(config, plan, dtype, cache_dtype))
    if isinstance(step, float):
        words = f"does not fit: {gb(step)} of temporaries alone, of {gb(plan.limit)} a chip"
        return [("compiled", words)], {"fits": False, "temporaries": step, "limit": plan.limit}
    rows, figures = _memory(step, plan.limit, "weights and cache", plan.total)
    greedy = step.prediction
    if greedy is None:
        return [*rows, ("predicted", f"nothing: the clock of {plan.topology.chip.name} is not known")], figures
    drawn = predict_round(step.text, plan.topology, longest=True)
    count = sum(greedy.collectives.values())
    rows += [
        ("predicted", f"{duration(greedy.simulated)} a step, {plan.batch / greedy.simulated:,.1f} tokens/s, "
                      f"{plan.step / greedy.simulated:.0%} of the limit; {duration(drawn.simulated)} with top-k or top-p"),
        ("", f"{_ESTIMATE}, and compared with no decoding that was"),
        ("transfers", f"{_transfers(greedy)}; each microsecond until one begins adds {duration(count * 1e-6)}"),
    ]  # fmt: skip
    predicted = greedy._asdict() | {"share_of_limit": plan.step / greedy.simulated, "simulated_drawn": drawn.simulated}
    return rows, figures | {"predicted": predicted}


def _prepare() -> None:
    """The compiler for TPUs on a machine without one, which opens no device: what its library looks at when it is loaded."""
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server which machine this is
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # and does not complain that nobody says so: what is compiled for is given
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # takes no lock
        "JAX_PLATFORMS": "cpu",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _announce(topology: Topology) -> None:
    """Says what is going to take so long, once it is known that programs can be compiled for these chips here."""
    from llama_jax.planning.ahead import topology_devices

    topology_devices(topology)
    note(f"compiling the step for {topology.name}, which takes minutes")


def _attempt(compile_step: Callable[[], "Compiled"]) -> "Compiled | float":
    """The compiled step; or bytes of its temporaries, where the compiler says that they are too many."""
    import jax

    from llama_jax.planning.ahead import too_large

    jax.config.update("jax_enable_compilation_cache", False)  # it could be written, but not read without a device
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
    figures = {"seconds": step.seconds, "arguments": step.arguments, "temporaries": step.temporaries, "total": total,
               "limit": limit, "closed_form": closed, "fits": total <= limit}  # fmt: skip
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
    row = ("compiled", f"does not fit: {gb(state)} of state + {gb(temporaries)} of temporaries = "
                       f"{gb(total)}; a chip has {gb(plan.limit)}")  # fmt: skip
    more, remedies = _instead(plan, total)
    figures = {"fits": False, "temporaries": temporaries, "total": total, "limit": plan.limit, "remedies": remedies}
    return [row, *more], figures


def _instead(plan: Plan, total: float) -> tuple[Rows, list[dict]]:
    """Changes with which the compiled step should fit, by the closed form, taken to be as much too small as it was."""
    smaller = plan._replace(limit=plan.limit * plan.memory.total / total)
    around = outlook(smaller)
    note = f", {gb(smaller.limit)} by closed form, where the compiler needs {total / plan.memory.total:.2f} times as much"
    return remedy_lines(smaller, around, note), remedies_json(around, plan.job)


def _transfers(times: Prediction) -> str:
    parts = [f"{count} x {kind} ({gb(times.moved[kind])})" for kind, count in sorted(times.collectives.items())]
    return ", ".join(parts) or "none"


def _copies(times: Prediction) -> str:
    """How many copies there are in loops, and what the largest are."""
    if not times.copies:
        return "none of 1 MiB or more in loops"
    bytes_of = {what: count * max(sizes(what), default=0.0) for what, count in times.copies.items()}
    largest = sorted(bytes_of, key=lambda what: -bytes_of[what])[:_SHOWN]
    shown = ", ".join(f"{times.copies[what]} x {re.sub(r'[{(].*', '', what.replace('(', ''))}" for what in largest)
    total = gb(sum(bytes_of.values()))
    return f"{sum(times.copies.values())} of 1 MiB or more in loops, {total} in all; the largest: {shown}"
