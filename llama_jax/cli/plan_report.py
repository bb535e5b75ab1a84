"""Plans in words, a row a fact: what it is about, what it takes, and what follows."""

from llama_jax.accounting import matmul_parameters, parameter_count
from llama_jax.formatting import duration
from llama_jax.planning.job import ITEMSIZES, Job, MeshSizes
from llama_jax.planning.memory import ACCURACY, hosted_bytes
from llama_jax.planning.plan import Outlook, Plan, Remedy, flags
from llama_jax.planning.speed import DecodePlan, Speed

Rows = list[tuple[str, str]]  # a name, or "" for more of the row before, and its text


def training_lines(
    model: str, plan: Plan, around: Outlook, tokens: int | None, asked: int | None
) -> Rows:
    """The plan of a training.

    Args:
      model: what it is called.
      plan: of the job as it is.
      around: other settings.
      tokens: to be trained on, for a row of days.
      asked: tokens of an update that were asked for, of which whole rows were made.
    """
    return [
        *_job_lines(model, plan.job, asked),
        *_memory_lines(plan),
        (
            "by remat",
            ", ".join(f"{_rung(other)} {gb(other.memory.total)}" for other in around.ladder)
            + " (* fits)",
        ),
        *_verdict_lines(plan, around),
        *_speed_lines(plan, tokens),
        ("modelled", f"memory: {ACCURACY}"),
        (
            "",
            f"time: share of peak {plan.job.topology.chip.share:.1%}, an assumption, "
            f"from {plan.job.topology.chip.source}; "
            "input, checkpoints, pauses and latency are not modelled",
        ),
    ]


def _rung(plan: Plan) -> str:
    return plan.job.remat + ("*" if plan.fits else "")


def gb(size: float) -> str:
    """Bytes in GB of 1e9, or in MB."""
    return (
        f"{size / 1e9:,.1f} GB"
        if abs(size) >= 1e9
        else f"{size / 1e9:.2f} GB"
        if abs(size) >= 1e7
        else f"{size / 1e6:.2f} MB"
    )


def _mesh(mesh: MeshSizes) -> str:
    return " x ".join(
        f"{axis} {size}" for axis, size in mesh._asdict().items() if size > 1 or axis == "fsdp"
    )


def _job_lines(model: str, job: Job, asked: int | None) -> Rows:
    config, chip, topology = job.config, job.topology.chip, job.topology
    pieces = "1 micro-batch" if job.microbatches == 1 else f"{job.microbatches} micro-batches"
    tokens = f"{job.chip_tokens:,.0f} tokens/chip at a time"
    learner = (
        f"adapters of rank {job.rank} over {job.base_dtype}, {job.optimizer}"
        if job.rank
        else job.optimizer
    )
    return [
        (
            "model",
            f"{model}: {parameter_count(config):,} parameters, "
            f"{matmul_parameters(config):,} of them in matrix products",
        ),
        (
            "chips",
            f"{topology.name}: {topology.chips} x {chip.name}, {gb(chip.memory)} and "
            f"{chip.peak / 1e12:g} TFLOP/s each; "
            f"mesh {_mesh(job.mesh)}",
        ),
        (
            "batch",
            f"{job.sequences:,} rows of {job.length:,} tokens, {job.tokens:,} an update, "
            f"in {pieces}: {tokens}",
        ),
        *_asked_lines(job, asked),
        (
            "training",
            f"{learner}, parameters {job.param_dtype}, compute {job.compute_dtype}, "
            f"remat {job.remat}, loss chunk "
            f"of {job.chunk_tokens:,.0f} tokens/chip",
        ),
    ]


def _asked_lines(job: Job, asked: int | None) -> Rows:
    """What was asked for, where an update of whole rows differs by more than 1 %."""
    if asked is None or abs(job.tokens - asked) <= 0.01 * asked:
        return []
    unit = job.mesh.sequences * job.microbatches * job.length
    return [
        (
            "",
            f"{asked:,} asked for; an update is a multiple of {unit:,}, one row a chip "
            "and micro-batch",
        )
    ]


def _memory_lines(plan: Plan) -> Rows:
    """A row for each part of the memory, with its share of the chip's."""
    job = plan.job
    kept = (
        "all that differentiation asks for"
        if job.remat == "none"
        else f"each layer's input and {job.remat}"
    )
    kept = "each layer's input" if job.remat == "full" else kept
    words = {
        "parameters": f"{job.param_dtype}" + (", adapters" if job.rank else ""),
        "frozen": f"the model, {job.base_dtype}",
        "optimizer": f"{job.optimizer}"
        + (f", mean in {job.moment_dtype}" if job.optimizer != "adafactor" else ""),
        "gradients": f"{job.param_dtype}"
        + (", and a sum of micro-batches in float32" if job.microbatches > 1 else ""),
        "activations": f"{kept}, {job.config.layers} layers",
        "gathered": "weights of all layers, kept with remat none"
        if job.remat == "none"
        else "weights of two layers in flight",
        "working": "one layer: gradients of its activations, what is computed again",
        "logits": "a chunk of the loss and its gradient",
        "head": "head and embedding gathered"
        + ("" if job.rank else ", the head's gradient in float32"),
        "beside": "what a GPU was seen to take more, statistics of packed documents in it",
        "update": "of the optimizer, when the passes' memory is free again",
    }
    rows = [
        (f"  {name}", f"{gb(size):>10}  {size / plan.limit:6.1%}  {words[name]}")
        for name, size in plan.memory._asdict().items()
        if size > 0
    ]
    total = plan.memory.total
    width = int(ITEMSIZES[job.compute_dtype])
    hosted = job.chip_tokens * hosted_bytes(job.config, job.remat, width, job.mesh.tensor)
    if hosted:
        rows.append(
            (
                "  host",
                f"{gb(hosted):>10}  of the host's memory, for each chip; the time of the "
                "transfers is not modelled",
            )
        )
    return [
        ("memory", "a chip, GB of 1e9 bytes"),
        *rows,
        ("  in all", f"{gb(total):>10}  {total / plan.limit:6.1%}"),
    ]


def _verdict_lines(plan: Plan, around: Outlook) -> Rows:
    """Whether it fits, and what to do about it."""
    if plan.fits:
        left = f"fits, {gb(plan.left)} a chip left"
        faster = _remedy_text(around.faster, plan) if around.faster else ""
        return [
            ("verdict", left),
            ("faster", faster)
            if faster
            else ("", "nothing on the ladder of remat that fits is faster"),
        ]
    return [
        ("verdict", f"does not fit: {gb(-plan.left)} a chip too many"),
        *remedy_lines(plan, around),
    ]


def remedy_lines(plan: Plan, around: Outlook, note: str = "") -> Rows:
    """What to do about a plan that does not fit; `note` says more of what counts as fitting."""
    if around.remedies:
        first = ("instead", f"the smallest changes that do{note}, the fastest first:")
        return [first, *[("", f"  {_remedy_text(remedy, plan)}") for remedy in around.remedies]]
    tried = (
        "no remat, number of micro-batches, loss chunk, mesh or moments in bfloat16 saves "
        "enough; not adafactor either"
    )
    more = ""
    if around.enough:
        larger = around.enough.job
        more = (
            f"more chips ({larger.topology.name} fits with remat full, mesh "
            f"{_mesh(larger.mesh)}, one row a chip at a time)"
        )
    narrower = "adapters over a narrower model (--adapter.rank 16 --adapter.base int8)"
    return [("", tried), ("instead", " or ".join(filter(None, [more, narrower])))]


def _remedy_text(remedy: Remedy, plan: Plan) -> str:
    speed = remedy.plan.speed
    typed = flags(remedy, plan.job)
    note = " (it learns differently)" if "adafactor" in typed else ""
    times = f"{speed.step / plan.speed.step:.2f} times as long"
    return f"{typed}{note}: {gb(remedy.plan.memory.total)}, {duration(speed.step)} a step, {times}"


def _speed_lines(plan: Plan, tokens: int | None) -> Rows:
    speed, chip = plan.speed, plan.job.topology.chip
    rate = speed.tokens_per_second
    waits = (
        f" and {duration(speed.streams)} of waits for the stream over tensor"
        if speed.streams
        else ""
    )
    rule = (
        f"at {chip.share:.1%} of peak"
        if speed.bound == "compute"
        else f"by {speed.bound} at nominal bandwidth"
    )
    rows = [
        (
            "FLOPs",
            f"{speed.flops_per_token:.4g} a token ({_formula(plan.job)}, causal); "
            f"{speed.recomputed:.1%} computed again",
        ),
        (
            "roofline",
            f"compute {duration(speed.compute)} at peak, "
            f"{duration(speed.expected_compute)} at {chip.share:.1%} "
            f"of it{waits}; memory {duration(speed.memory)}; {_links(speed)}: bound by "
            f"{speed.bound}",
        ),
        ("step", f"{duration(speed.step)}: expected, closed form, {rule}"),
        (
            "speed",
            f"{rate:,.0f} tokens/s, {rate / speed.chips:,.0f} a chip; causal MFU {speed.mfu:.1%}",
        ),
    ]
    if tokens is None:
        return rows
    days = tokens / rate / 86400
    shown = f"{days:,.0f}" if days >= 100 else f"{days:.3g}"
    return [
        *rows,
        ("days", f"{shown} for {tokens:.4g} tokens, {tokens / plan.job.tokens:,.0f} updates"),
    ]


def _formula(job: Job) -> str:
    products = "4 matmul parameters + adapters" if job.rank else "6 matmul parameters"
    return f"{products} + 6·layers·heads·head_dim·T"


def _links(speed: Speed) -> str:
    network = f", network {duration(speed.network)}" if speed.network else ""
    return f"links {duration(speed.links)}{network}"


def decode_lines(model: str, plan: DecodePlan, dtype: str) -> Rows:
    """The plan of decoding."""
    chip = plan.topology.chip
    parts = {
        "weights": (plan.weights, dtype),
        "cache": (plan.cache, f"{plan.batch:,} rows of {plan.length:,} tokens"),
        "logits": (plan.logits, "float32"),
    }
    left = plan.limit - plan.total
    verdict = (
        f"fits, {gb(left)} a chip left"
        if left >= 0
        else f"does not fit: {gb(-left)} a chip too many; " + _smaller(plan, dtype)
    )
    return [
        ("model", f"{model}, weights {dtype}"),
        (
            "chips",
            f"{plan.topology.name}: {plan.topology.chips} x {chip.name}, {gb(chip.memory)} and "
            f"{chip.bandwidth / 1e12:.2f} TB/s each; mesh data {plan.mesh.data} x tensor "
            f"{plan.mesh.tensor}",
        ),
        ("memory", "a chip, GB of 1e9 bytes"),
        *[
            (f"  {name}", f"{gb(size):>10}  {size / plan.limit:6.1%}  {words}")
            for name, (size, words) in parts.items()
        ],
        ("  in all", f"{gb(plan.total):>10}  {plan.total / plan.limit:6.1%}"),
        ("verdict", verdict),
        (
            "moved",
            f"{gb(plan.moved)} a step and chip: every matrix once, the cache of full rows; "
            f"{gb(plan.bytes_per_token)} a token",
        ),
        (
            "limit",
            f"{plan.tokens_per_second:,.1f} tokens/s, {duration(plan.step)} a step: "
            "memory bandwidth alone, closed form; "
            "published decoders reach 60 to 90 % of it",
        ),
    ]


def _smaller(plan: DecodePlan, dtype: str) -> str:
    """What helps where decoding does not fit."""
    narrower = "" if dtype != "bfloat16" else "--quantize int8, "
    return (
        f"{narrower}--cache-dtype int8, fewer rows (--batch), shorter ones (--length), or "
        "more chips along tensor"
    )


# --- plan json ---
#
# Plans as numbers for other programs: bytes of one chip, seconds of one update or decoding step.


def training_json(plan: Plan, around: Outlook, tokens: int | None, asked: int | None) -> dict:
    """A training's plan; `days` where the tokens to be trained on are given, `tokens_asked` where
    those of an update are.
    """
    job = plan.job
    figures = {
        "chips": job.topology.chips,
        "mesh": job.mesh._asdict(),
        "sequences": job.sequences,
        "tokens_per_step": job.tokens,
        "microbatches": job.microbatches,
        "remat": job.remat,
        "loss_chunk": job.loss_chunk,
        "memory": plan.memory._asdict() | {"total": plan.memory.total, "limit": plan.limit},
        "fits": plan.fits,
        "by_remat": {other.job.remat: other.memory.total for other in around.ladder},
        "remedies": remedies_json(around, job),
        "enough_chips": around.enough.job.topology.name if around.enough else None,
        "faster": _remedy_json(around.faster, job) if around.faster else None,
        "share_of_peak": job.topology.chip.share,
    }
    days = {} if tokens is None else {"days": tokens / plan.speed.tokens_per_second / 86400}
    update = {} if asked is None else {"tokens_asked": asked}
    return figures | update | _speed_json(plan.speed) | days


def _speed_json(speed: Speed) -> dict:
    return {
        "flops_per_token": speed.flops_per_token,
        "recomputed": speed.recomputed,
        "seconds": {
            "compute_at_peak": speed.compute,
            "compute": speed.expected_compute,
            "streams": speed.streams,
            "memory": speed.memory,
            "links": speed.links,
            "network": speed.network,
            "step": speed.step,
        },
        "bound": speed.bound,
        "tokens_per_second": speed.tokens_per_second,
        "mfu": speed.mfu,
    }


def remedies_json(around: Outlook, job: Job) -> list[dict]:
    """The changes that make a job fit."""
    return [_remedy_json(remedy, job) for remedy in around.remedies]


def _remedy_json(remedy: Remedy, job: Job) -> dict:
    speed = remedy.plan.speed
    return {
        "flags": flags(remedy, job),
        "total": remedy.plan.memory.total,
        "step": speed.step,
        "tokens_per_second": speed.tokens_per_second,
    }


def decode_json(plan: DecodePlan) -> dict:
    """A plan of decoding."""
    memory = {
        "weights": plan.weights,
        "cache": plan.cache,
        "logits": plan.logits,
        "total": plan.total,
        "limit": plan.limit,
    }
    return {
        "chips": plan.topology.chips,
        "mesh": plan.mesh._asdict(),
        "batch": plan.batch,
        "length": plan.length,
        "memory": memory,
        "fits": plan.total <= plan.limit,
        "bytes_per_step": plan.moved,
        "bytes_per_token": plan.bytes_per_token,
        "seconds": plan.step,
        "tokens_per_second_limit": plan.tokens_per_second,
    }
