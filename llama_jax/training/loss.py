"""Cross-entropy of the next token without the logits: they exist for one chunk of tokens at a time.

The forward pass also forms the gradients of features and head while a chunk's logits are at hand, so that training makes
three matrix products with the head instead of four and never holds `[B, T, V]`, neither forward nor backward.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.axes import Array, Float, Int, Parameters
from llama_jax.config import LlamaConfig
from llama_jax.data.batches import Batch
from llama_jax.errors import InputError
from llama_jax.model.llama import Llama, apply, model_for

_MEAN_CHUNK = 2048  # tokens whose logits exist at one time in `mean_loss`


def _chunks(x: Array, count: int, size: int) -> Array:
    """[B, T, ...] padded with zeros to `count * size` tokens and cut: [count, B, size, ...]."""
    pads = ((0, 0), (0, count * size - x.shape[1])) + ((0, 0),) * (x.ndim - 2)
    cut = jnp.pad(x, pads).reshape(x.shape[0], count, size, *x.shape[2:])
    return jnp.moveaxis(cut, 1, 0)


def _cut(features: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, Array, Array]:
    """Features, targets and weights in chunks of about `chunk` tokens of the whole batch; padding weighs nothing."""
    batch, length = targets.shape
    size = max(1, min(length, chunk // batch))
    count = -(-length // size)
    return _chunks(features, count, size), _chunks(targets, count, size), _chunks(weights, count, size)


def _losses(features: Array, head: Array, targets: Array) -> tuple[Float[Array, "B C V"], Float[Array, "B C"]]:
    """Log-probabilities of a chunk's tokens and the loss at its targets, float32."""
    logits = jnp.einsum("bcd,dv->bcv", features, head, preferred_element_type=jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return log_probabilities, -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    features: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
) -> Float[Array, ""]:
    """Sum of weight * -log p(target), in nats, float32.

    Args:
      features: normed stream, ready for the head.
      head: output matrix.
      targets: the token to be predicted at each position.
      weights: 0 leaves a position out.
      chunk: tokens of the whole batch whose logits exist at one time.
    """

    def add(total: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        """Adds the loss of a chunk."""
        part, target, weight = piece
        return total + jnp.sum(weight * _losses(part, head, target)[1]), None

    return lax.scan(add, jnp.zeros((), jnp.float32), _cut(features, targets, weights, chunk))[0]


def _cross_entropy_forward(features: Array, head: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, tuple]:
    def add(carry: tuple[Array, Array], piece: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        """Adds the loss of a chunk and its part of the head's gradient; gives the gradient of its features."""
        total, d_head = carry
        part, target, weight = piece
        log_probabilities, losses = _losses(part, head, target)
        at_target = lax.broadcasted_iota(jnp.int32, log_probabilities.shape, 2) == target[..., None]
        d_logits = ((jnp.exp(log_probabilities) - at_target) * weight[..., None]).astype(part.dtype)
        d_part = jnp.einsum("bcv,dv->bcd", d_logits, head, preferred_element_type=jnp.float32)
        d_head += jnp.einsum("bcd,bcv->dv", part, d_logits, preferred_element_type=jnp.float32)
        return (total + jnp.sum(weight * losses), d_head), d_part.astype(part.dtype)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), parts = lax.scan(add, start, _cut(features, targets, weights, chunk))
    batch, length, dim = features.shape
    d_features = jnp.moveaxis(parts, 0, 1).reshape(batch, -1, dim)[:, :length]
    return total, (d_features, d_head.astype(head.dtype))


def _cross_entropy_backward(chunk: int, saved: tuple[Array, Array], scale: Array) -> tuple:
    d_features, d_head = saved
    return (d_features * scale).astype(d_features.dtype), (d_head * scale).astype(d_head.dtype), None, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def row_losses(
    features: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
) -> Float[Array, " B"]:
    """Sum of weight * -log p(target) of each row, in nats, float32, under a frozen head: no gradient of it is formed.

    Args:
      features: normed stream, ready for the head; the only argument that gradients reach.
      head: output matrix, a constant.
      targets: the token to be predicted at each position.
      weights: 0 leaves a position out.
      chunk: tokens of the whole batch whose logits exist at one time.
    """

    def add(totals: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        """Adds the losses of a chunk."""
        part, target, weight = piece
        return totals + jnp.sum(weight * _losses(part, head, target)[1], axis=1), None

    return lax.scan(add, jnp.zeros(features.shape[:1], jnp.float32), _cut(features, targets, weights, chunk))[0]


def _row_losses_forward(features: Array, head: Array, targets: Array, weights: Array, chunk: int) -> tuple[Array, Array]:
    def add(totals: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        """Adds the losses of a chunk; gives the gradient of its features."""
        part, target, weight = piece
        log_probabilities, losses = _losses(part, head, target)
        at_target = lax.broadcasted_iota(jnp.int32, log_probabilities.shape, 2) == target[..., None]
        d_logits = ((jnp.exp(log_probabilities) - at_target) * weight[..., None]).astype(part.dtype)
        d_part = jnp.einsum("bcv,dv->bcd", d_logits, head, preferred_element_type=jnp.float32)
        return totals + jnp.sum(weight * losses, axis=1), d_part.astype(part.dtype)

    start = jnp.zeros(features.shape[:1], jnp.float32)
    totals, parts = lax.scan(add, start, _cut(features, targets, weights, chunk))
    batch, length, dim = features.shape
    return totals, jnp.moveaxis(parts, 0, 1).reshape(batch, -1, dim)[:, :length]


def _row_losses_backward(chunk: int, d_features: Array, scales: Array) -> tuple:
    return (d_features * scales[:, None, None]).astype(d_features.dtype), None, None, None


row_losses.defvjp(_row_losses_forward, _row_losses_backward)


def batch_loss(model: Llama, params: Parameters, batch: Batch, chunk: int) -> Float[Array, ""]:
    """Sum over a batch of weight * -log p(target) in nats; divide by the sum of the weights for the mean a token."""
    last = apply(model, params, batch.tokens, batch.documents, method="features").last
    head = apply(model, params, method="head_matrix")
    return cross_entropy(last, head, batch.targets, batch.weights, chunk)


def batch_row_losses(model: Llama, params: Parameters, batch: Batch, chunk: int) -> Float[Array, " B"]:
    """Sum over each row of weight * -log p(target) in nats; the head (plain or quantised) is a constant."""
    last = apply(model, params, batch.tokens, batch.documents, method="features").last
    head = lax.stop_gradient(apply(model, params, method="head_matrix"))
    return row_losses(last, head, batch.targets, batch.weights, chunk)


class Objective(NamedTuple):
    """What training makes small, as sums over a batch, so that micro-batches can be added up.

    Attributes:
      loss: from model, parameters, batch `[B, T]` and chunk of the loss to the summed loss, and further sums by name.
      targets: from a batch, or micro-batches `[A, B, T]`, to what the sums are divided by in the end.
    """

    loss: Callable[[Llama, Parameters, Batch, int], tuple[Float[Array, ""], dict[str, Array]]]
    targets: Callable[[Batch], Float[Array, ""]]


def target_weight(batch: Batch) -> Float[Array, ""]:
    """The weight of all targets."""
    return jnp.sum(batch.weights)


NEXT_TOKEN = Objective(lambda *given: (batch_loss(*given), {}), target_weight)
# The same where nothing of the head is trained: two products with it instead of three.
NEXT_TOKEN_FROZEN_HEAD = Objective(lambda *given: (jnp.sum(batch_row_losses(*given)), {}), target_weight)


def mean_loss(
    params: Parameters,
    tokens: Int[Array, "B T"],
    config: LlamaConfig,
    weights: Float[Array, "B T"] | None = None,
    **options: Any,
) -> Float[Array, ""]:
    """Mean loss of predicting each token from those before it, nats a token; differentiable in `params`.

    Args:
      params: parameters, stacked or unrolled.
      tokens: token ids; the last one is only predicted, the first one only given.
      config: the architecture.
      weights: how much each token counts as a target; the first column does not matter. All alike by default. They are
        constants: no gradient reaches them.
      **options: `dtype`, `attention`, `remat`, `rules` of `ModelOptions`.

    Raises:
      InputError: for rows of fewer than two tokens.
    """
    if tokens.shape[1] < 2:
        raise InputError(f"rows of {tokens.shape[1]} tokens given; at least 2 expected, one to predict the other from")
    counted = jnp.ones(tokens.shape, jnp.float32)[:, 1:] if weights is None else weights[:, 1:]
    batch = Batch(tokens[:, :-1], tokens[:, 1:], counted, jnp.ones_like(tokens[:, 1:]))
    return batch_loss(model_for(params, config, **options), params, batch, _MEAN_CHUNK) / jnp.sum(counted)
