"""Cross-entropy of the next token without the logits: they exist for one chunk of tokens at a time.

The forward pass also forms the gradients of features and head while a chunk's logits are at hand, so that training makes
three matrix products with the head instead of four and never holds `[B, T, V]`, neither forward nor backward.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.axes import Array, Float, Int


def _chunks(x: Array, count: int, size: int, parts: int) -> Array:
    """[B, T, ...] in `count` pieces of `size` tokens, `[count, B, size, ...]`; zeros fill up each of the `parts` of a row.

    A piece has its share of every part of the row, so that devices that hold one part each are all at work on it.
    """
    lead, more = _lead(x.shape[0], parts), x.shape[2:]
    x = x.reshape(*lead, -1, *more)
    pads = (*((0, 0),) * len(lead), (0, count * size // parts - x.shape[len(lead)]), *((0, 0),) * len(more))
    cut = jnp.pad(x, pads).reshape(*lead, count, size // parts, *more)
    return jnp.moveaxis(cut, len(lead), 0).reshape(count, x.shape[0], size, *more)


def _lead(rows: int, parts: int) -> tuple[int, ...]:
    """Dimensions before the tokens of a part."""
    return (rows,) if parts == 1 else (rows, parts)


def _cut(features: Array, targets: Array, weights: Array, chunk: int, parts: int) -> tuple[Array, Array, Array]:
    """Features, targets and weights in chunks of about `chunk` tokens of the whole batch; padding weighs nothing."""
    batch, length = targets.shape
    size = max(1, min(length, chunk // batch) // parts)
    count = -(-length // (parts * size))
    return tuple(_chunks(x, count, size * parts, parts) for x in (features, targets, weights))  # type: ignore[return-value]


class _Scores(NamedTuple):
    """What the logits of a chunk say of its tokens, float32."""

    log_probabilities: Float[Array, "B C V"]
    losses: Float[Array, "B C"]
    log_z: Float[Array, "B C"]


def _scores(features: Array, head: Array, targets: Array) -> _Scores:
    logits = jnp.einsum("bcd,dv->bcv", features, head, preferred_element_type=jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    losses = -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    return _Scores(log_probabilities, losses, logits[..., 0] - log_probabilities[..., 0])  # any column says log Z


def _with_gradients(
    part: Array, head: Array, target: Array, weight: Array, z_loss: float = 0.0
) -> tuple[_Scores, Array, Array]:
    """Scores of a chunk, and the gradients of its weighted losses: of the logits in the compute dtype, of the features."""
    scores = _scores(part, head, target)
    probabilities = jnp.exp(scores.log_probabilities)
    if z_loss:  # each logit moves log Z by its probability
        probabilities = probabilities * (1 + 2 * z_loss * scores.log_z[..., None])
    at_target = lax.broadcasted_iota(jnp.int32, probabilities.shape, 2) == target[..., None]
    d_logits = ((probabilities - at_target) * weight[..., None]).astype(part.dtype)
    d_part = jnp.einsum("bcv,dv->bcd", d_logits, head, preferred_element_type=jnp.float32)
    return scores, d_logits, d_part.astype(part.dtype)


def _joined(chunks: Array, features: Array, parts: int) -> Array:
    """Chunks `[count, B, size, D]` put together as the features they were cut from, without their padding."""
    (batch, length, dim), count = features.shape, chunks.shape[0]
    lead = _lead(batch, parts)
    cut = jnp.moveaxis(chunks.reshape(count, *lead, -1, dim), 0, len(lead))
    return cut.reshape(*lead, -1, dim)[..., : length // parts, :].reshape(features.shape)


_Sums = tuple[Float[Array, ""], Float[Array, ""]]  # of the losses, and of the z-losses


def _sums(scores: _Scores, weight: Array, z_loss: float) -> _Sums:
    """Of a chunk, weighted; nothing is computed for a z-loss that is off."""
    z = z_loss * jnp.sum(weight * jnp.square(scores.log_z)) if z_loss else jnp.zeros((), jnp.float32)
    return jnp.sum(weight * scores.losses), z


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy_and_z(
    features: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    z_loss: float,
    parts: int = 1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of weight * -log p(target), and sum of weight * z_loss * log(Z)^2, in nats, float32.

    The first carries the gradients of both, so that what is reported stays the cross-entropy; the second carries none.

    Args:
      features: normed stream, ready for the head.
      head: output matrix.
      targets: the token to be predicted at each position.
      weights: 0 leaves a position out.
      chunk: tokens of the whole batch whose logits exist at one time.
      z_loss: coefficient; 0 for the cross-entropy alone, at no cost.
      parts: equal parts of a row that lie on different devices.
    """

    def add(totals: _Sums, piece: tuple[Array, Array, Array]) -> tuple[_Sums, None]:
        """Adds the losses of a chunk."""
        part, target, weight = piece
        return jax.tree.map(jnp.add, totals, _sums(_scores(part, head, target), weight, z_loss)), None

    start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    return lax.scan(add, start, _cut(features, targets, weights, chunk, parts))[0]


def _cross_entropy_forward(
    features: Array, head: Array, targets: Array, weights: Array, chunk: int, z_loss: float, parts: int
) -> tuple[_Sums, tuple[Array, Array]]:
    def add(carry: tuple[_Sums, Array], piece: tuple[Array, Array, Array]) -> tuple[tuple[_Sums, Array], Array]:
        """Adds the losses of a chunk and its part of the head's gradient; gives the gradient of its features."""
        totals, d_head = carry
        part, target, weight = piece
        scores, d_logits, d_part = _with_gradients(part, head, target, weight, z_loss)
        d_head += jnp.einsum("bcd,bcv->dv", part, d_logits, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, totals, _sums(scores, weight, z_loss)), d_head), d_part

    nothing = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    start = (nothing, jnp.zeros(head.shape, jnp.float32))
    (totals, d_head), pieces = lax.scan(add, start, _cut(features, targets, weights, chunk, parts))
    return totals, (_joined(pieces, features, parts), d_head.astype(head.dtype))


def _cross_entropy_backward(
    chunk: int, z_loss: float, parts: int, saved: tuple[Array, Array], scales: tuple[Array, Array]
) -> tuple:
    d_features, d_head = saved
    scale, _ = scales
    return (d_features * scale).astype(d_features.dtype), (d_head * scale).astype(d_head.dtype), None, None


cross_entropy_and_z.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def cross_entropy(
    features: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    parts: int = 1,
) -> Float[Array, ""]:
    """Sum of weight * -log p(target), in nats, float32; arguments as for `cross_entropy_and_z`."""
    return cross_entropy_and_z(features, head, targets, weights, chunk, 0.0, parts)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def row_losses(
    features: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    parts: int = 1,
) -> Float[Array, " B"]:
    """Sum of weight * -log p(target) of each row, in nats, float32, under a frozen head: no gradient of it is formed.

    Args:
      features: normed stream, ready for the head; the only argument that gradients reach.
      head: output matrix, a constant.
      targets: the token to be predicted at each position.
      weights: 0 leaves a position out.
      chunk: tokens of the whole batch whose logits exist at one time.
      parts: equal parts of a row that lie on different devices.
    """

    def add(totals: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, None]:
        """Adds the losses of a chunk."""
        part, target, weight = piece
        return totals + jnp.sum(weight * _scores(part, head, target).losses, axis=1), None

    return lax.scan(add, jnp.zeros(features.shape[:1], jnp.float32), _cut(features, targets, weights, chunk, parts))[0]


def _row_losses_forward(
    features: Array, head: Array, targets: Array, weights: Array, chunk: int, parts: int
) -> tuple[Array, Array]:
    def add(totals: Array, piece: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        """Adds the losses of a chunk; gives the gradient of its features."""
        part, target, weight = piece
        scores, _, d_part = _with_gradients(part, head, target, weight)
        return totals + jnp.sum(weight * scores.losses, axis=1), d_part

    start = jnp.zeros(features.shape[:1], jnp.float32)
    totals, pieces = lax.scan(add, start, _cut(features, targets, weights, chunk, parts))
    return totals, _joined(pieces, features, parts)


def _row_losses_backward(chunk: int, parts: int, d_features: Array, scales: Array) -> tuple:
    return (d_features * scales[:, None, None]).astype(d_features.dtype), None, None, None


row_losses.defvjp(_row_losses_forward, _row_losses_backward)
