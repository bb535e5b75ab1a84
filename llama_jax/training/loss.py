"""What training makes small, from the model, its parameters and a batch: the loss of the next
token.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.axes import Array, Bool, Float, Int, Num, Parameters
from llama_jax.config import LlamaConfig
from llama_jax.data.packing import Batch
from llama_jax.errors import InputError
from llama_jax.model.llama import Llama, apply, model_for, require_tokens
from llama_jax.model.lora import without_adapters
from llama_jax.parallel.sharding import balanced_positions, constrain, parts_of
from llama_jax.training.cross_entropy import cross_entropy, cross_entropy_and_z, sequence_losses

_MEAN_CHUNK = 2048  # tokens of one device whose logits exist at one time in `mean_loss`


class _Ready(NamedTuple):
    """What the loss of a batch is made of: the stream ready for the head, and the head; targets and
    weights.
    """

    last: Float[Array, "B T D"]
    head: Float[Array, "D V"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]


def _ready(model: Llama, params: Parameters, batch: Batch) -> _Ready:
    """The forward pass of a batch, tokens laid out so that devices that share a sequence share its
    work; the loss is a sum.
    """
    rules = model.options.rules
    parts, positions = parts_of("length", rules), None
    if parts > 1:
        positions = jnp.asarray(balanced_positions(batch.tokens.shape[1], parts))
        batch = jax.tree.map(
            lambda x: constrain(x[:, positions], ("batch", "length"), rules), batch
        )
    last = apply(
        model, params, batch.tokens, batch.documents, method="features", positions=positions
    ).last
    return _Ready(last, apply(model, params, method="head_matrix"), batch.targets, batch.weights)


def batch_loss(model: Llama, params: Parameters, batch: Batch, chunk: int) -> Float[Array, ""]:
    """Sum over a batch of weight * -log p(target) in nats; divide by the sum of the weights for the
    mean a token.
    """
    last, head, targets, weights = _ready(model, params, batch)
    return cross_entropy(last, head, targets, weights, chunk, model.options.rules)


def batch_sequence_losses(
    model: Llama, params: Parameters, batch: Batch, chunk: int
) -> Float[Array, " B"]:
    """Sum over each sequence of weight * -log p(target) in nats; the head (plain or quantised) is a
    constant.
    """
    last, head, targets, weights = _ready(model, params, batch)
    return sequence_losses(
        last, lax.stop_gradient(head), targets, weights, chunk, model.options.rules
    )


class Objective(NamedTuple):
    """What training makes small, as sums over a batch, so that micro-batches can be added up.

    Attributes:
      loss: from model, parameters, batch `[B, T]` and chunk of the loss to the summed loss, and
        further sums by name.
      targets: from a batch, or micro-batches `[A, B, T]`, to the divisor of the sums in the
        end.
    """

    loss: Callable[[Llama, Parameters, Batch, int], tuple[Float[Array, ""], dict[str, Array]]]
    targets: Callable[[Batch], Float[Array, ""]]


def target_weight(batch: Batch) -> Float[Array, ""]:
    """The weight of all targets."""
    return jnp.sum(batch.weights)


NEXT_TOKEN = Objective(lambda *given: (batch_loss(*given), {}), target_weight)
# The same where nothing of the head is trained: two products with it instead of three.
NEXT_TOKEN_FROZEN_HEAD = Objective(
    lambda *given: (jnp.sum(batch_sequence_losses(*given)), {}), target_weight
)


def next_token(z_loss: float) -> Objective:
    """Predicting the next token, with a z-loss in the gradient; its mean is then among the further
    ones, as `z_loss`.

    Args:
      z_loss: coefficient; 0 for none.
    """

    def loss(
        model: Llama, params: Parameters, batch: Batch, chunk: int
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The sums over a batch."""
        last, head, targets, weights = _ready(model, params, batch)
        total, z = cross_entropy_and_z(
            last, head, targets, weights, chunk, z_loss, model.options.rules
        )
        return total, {"z_loss": z}

    return Objective(loss, target_weight) if z_loss else NEXT_TOKEN


def mean_loss(
    params: Parameters,
    tokens: Any,
    config: LlamaConfig,
    weights: Num[Array, "B T"] | Bool[Array, "B T"] | None = None,
    **options: Any,
) -> Float[Array, ""]:
    """Mean loss of predicting each token from those before it, nats/token; differentiable in
    `params`.

    Args:
      params: parameters, stacked or unrolled.
      tokens: token ids `[B, T]`, integers; the first one is only given and the last one only
        predicted. All `T` of them are run, so that the length suits a kernel whenever `T` does;
        nothing is asked of what follows the last.
      config: the architecture.
      weights: how much each token counts as a target, numbers or booleans; the first column does
        not matter. All alike by default. They are constants: their gradient is 0.
      **options: `dtype` (that of the parameters by default), `attention`, `remat`, `rules` of
        `ModelOptions`.

    Raises:
      InputError: for sequences of fewer than two tokens, and for anything but an array `[B, T]` of
        integers.
    """
    require_tokens(tokens)
    tokens = jnp.asarray(tokens)
    if tokens.shape[1] < 2:
        raise InputError(
            f"sequences of {tokens.shape[1]} tokens given; at least 2 expected, one to "
            "predict the other from"
        )
    given = (
        jnp.ones(tokens.shape)
        if weights is None
        else lax.stop_gradient(jnp.asarray(weights, jnp.float32))
    )
    targets, counted = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (tokens, given))
    batch = Batch(tokens, targets, counted, None)
    return batch_loss(model_for(params, config, **options), params, batch, _MEAN_CHUNK) / jnp.sum(
        counted
    )


# --- preference ---
#
# Direct preference optimisation (arXiv:2305.18290): of two answers to a prompt the chosen one is
# made the likelier.
#
# Rows come in pairs, sequence `2i` the chosen and sequence `2i + 1` the rejected answer, with
# weights on the tokens of the answers. What the policy is compared with is the model without its
# adapters: the same arrays, not a second copy.


def preference_objective(beta: float) -> Objective:
    """Mean over pairs of -log sigmoid(beta * (log-ratio of the chosen sequence - log-ratio of the
    rejected one)).

    A sequence's log-ratio is log p of its answer under the policy minus that under the model
    without adapters. The further means are `accuracy`, the share of pairs whose chosen sequence has
    the larger log-ratio, `margin`, beta times the difference, and `chosen` and `rejected`, beta
    times the log-ratios.

    Args:
      beta: how much it costs to leave the model without adapters.
    """
    return Objective(
        functools.partial(_preference_loss, beta=beta), lambda batch: jnp.sum(_real_pairs(batch))
    )


def _real_pairs(batch: Batch) -> Float[Array, "... P"]:
    """1 for pairs whose sequences both have targets, 0 for padding."""
    real = jnp.any(batch.weights > 0, axis=-1)
    return (real[..., 0::2] & real[..., 1::2]).astype(jnp.float32)


def _preference_loss(
    model: Llama, params: Parameters, batch: Batch, chunk: int, beta: float
) -> tuple[Float[Array, ""], dict[str, Array]]:
    reference = jax.lax.stop_gradient(
        batch_sequence_losses(model, without_adapters(params), batch, chunk)
    )
    rewards = beta * (reference - batch_sequence_losses(model, params, batch, chunk))
    chosen, rejected = rewards[0::2], rewards[1::2]
    margin, real = chosen - rejected, _real_pairs(batch)
    each = {"accuracy": margin > 0, "margin": margin, "chosen": chosen, "rejected": rejected}
    return -jnp.sum(real * jax.nn.log_sigmoid(margin)), {
        name: jnp.sum(real * values) for name, values in each.items()
    }
