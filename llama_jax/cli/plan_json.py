"""Plans as numbers for other programs: bytes of one chip, seconds of one update or decoding step."""

from llama_jax.planning.decode import DecodePlan
from llama_jax.planning.flags import flags
from llama_jax.planning.job import Job
from llama_jax.planning.plan import Plan, Remedy
from llama_jax.planning.search import Outlook
from llama_jax.planning.speed import Speed


def training_json(plan: Plan, around: Outlook, tokens: int | None, asked: int | None) -> dict:
    """A training's plan; `days` where the tokens to be trained on are given, `tokens_asked` where those of an update are."""
    job = plan.job
    figures = {
        "chips": job.topology.chips, "mesh": job.mesh._asdict(), "rows": job.rows, "tokens_per_step": job.tokens,
        "microbatches": job.microbatches, "remat": job.remat, "loss_chunk": job.loss_chunk,
        "memory": plan.memory._asdict() | {"total": plan.memory.total, "limit": plan.limit},
        "fits": plan.fits,
        "by_remat": {other.job.remat: other.memory.total for other in around.ladder},
        "remedies": remedies_json(around, job),
        "enough_chips": around.enough.job.topology.name if around.enough else None,
        "faster": _remedy_json(around.faster, job) if around.faster else None,
        "share_of_peak": job.topology.chip.share,
    }  # fmt: skip
    days = {} if tokens is None else {"days": tokens / plan.speed.tokens_per_second / 86400}
    update = {} if asked is None else {"tokens_asked": asked}
    return figures | update | _speed_json(plan.speed) | days


def _speed_json(speed: Speed) -> dict:
    return {
        "flops_per_token": speed.flops_per_token, "recomputed": speed.recomputed,
        "seconds": {"compute_at_peak": speed.compute, "compute": speed.expected_compute, "streams": speed.streams,
                    "memory": speed.memory, "links": speed.links, "network": speed.network, "step": speed.step},
        "bound": speed.bound, "tokens_per_second": speed.tokens_per_second, "mfu": speed.mfu,
    }  # fmt: skip


def remedies_json(around: Outlook, job: Job) -> list[dict]:
    """The changes that make a job fit."""
    return [_remedy_json(remedy, job) for remedy in around.remedies]


def _remedy_json(remedy: Remedy, job: Job) -> dict:
    speed = remedy.plan.speed
    return {"flags": flags(remedy, job), "total": remedy.plan.memory.total, "step": speed.step,
            "tokens_per_second": speed.tokens_per_second}  # fmt: skip


def decode_json(plan: DecodePlan) -> dict:
    """A plan of decoding."""
    memory = {"weights": plan.weights, "cache": plan.cache, "logits": plan.logits, "total": plan.total, "limit": plan.limit}
    return {
        "chips": plan.topology.chips, "mesh": plan.mesh._asdict(), "batch": plan.batch, "length": plan.length,
        "memory": memory, "fits": plan.total <= plan.limit, "bytes_per_step": plan.moved,
        "bytes_per_token": plan.bytes_per_token, "seconds": plan.step, "tokens_per_second_limit": plan.tokens_per_second,
    }  # fmt: skip
