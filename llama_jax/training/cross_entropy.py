"""Cross-entropy of the next token without the logits: they exist for one chunk of a device's tokens
at a time.

The forward pass also forms the gradients of features and head while a chunk's logits are at hand,
so that training makes three matrix products with the head instead of four and never holds `[B, T,
V]`, neither forward nor backward. On a mesh every device sweeps over its own tokens and its own
part of the vocabulary; their results are combined once, at the end.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from llama_jax.axes import Array, Float, Int
from llama_jax.parallel.sharding import TRAINING, Rules, fitting_spec, mesh_axes


class _Axes(NamedTuple):
    """Mesh axes over which the arrays of a loss are split, as one device sees them.

    Attributes:
      tokens: those of batch and length.
      length: those of length alone.
      vocab: those of the head's columns.
      kept: those of `tokens` over which the head's gradient is left split, by rows.
    """

    tokens: tuple[str, ...] = ()
    length: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def _sum(x: Array, names: tuple[str, ...]) -> Array:
    return lax.psum(x, names) if names else x


class _Scores(NamedTuple):
    """What the logits of a chunk say of its tokens, float32."""

    logits: Float[Array, "C v"]
    at_target: Array
    log_z: Float[Array, " C"]
    losses: Float[Array, " C"]


def _scores(features: Array, head: Array, targets: Array, axes: _Axes) -> _Scores:
    """Of a chunk; the columns of the head may be a part of the vocabulary."""
    logits = jnp.dot(features, head, preferred_element_type=jnp.float32)
    first = lax.axis_index(axes.vocab) * head.shape[1] if axes.vocab else 0
    at_target = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[:, None] - first
    peak = jnp.max(logits, axis=-1)
    peak = lax.pmax(peak, axes.vocab) if axes.vocab else peak
    log_z = peak + jnp.log(_sum(jnp.sum(jnp.exp(logits - peak[:, None]), axis=-1), axes.vocab))
    aimed = _sum(jnp.sum(jnp.where(at_target, logits, 0.0), axis=-1), axes.vocab)
    return _Scores(logits, at_target, log_z, log_z - aimed)


def _gradients(
    scores: _Scores, head: Array, weight: Array, axes: _Axes, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """Gradients of a chunk's weighted losses: of the logits in the compute dtype, of the
    features.
    """
    probabilities = jnp.exp(scores.logits - scores.log_z[:, None])
    if z_loss:  # each logit moves log Z by its probability
        probabilities = probabilities * (1 + 2 * z_loss * scores.log_z[:, None])
    d_logits = ((probabilities - scores.at_target) * weight[:, None]).astype(head.dtype)
    d_features = lax.dot_general(
        d_logits, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return d_logits, _sum(d_features, axes.vocab)


_Tokens = tuple[Array, Array, Array]  # features [M, D], targets [M], weights [M]


def _cut(features: Array, targets: Array, weights: Array, chunk: int) -> _Tokens:
    """Tokens of all sequences one after the other, in chunks `[n, C, ...]`; padding weighs
    nothing.
    """
    tokens = targets.size
    size = min(chunk, tokens)
    count = -(-tokens // size)

    def chunks(x: Array) -> Array:
        """[B, T, ...] as [n, C, ...]."""
        flat = x.reshape(tokens, *x.shape[2:])
        return jnp.pad(flat, ((0, count * size - tokens),) + ((0, 0),) * (flat.ndim - 1)).reshape(
            count, size, *flat.shape[1:]
        )

    return chunks(features), chunks(targets), chunks(weights)


def _joined(parts: Array, like: Array) -> Array:
    """Chunks `[n, C, ...]` as the sequences `[B, T, ...]` that they were cut from, without their
    padding.
    """
    return parts.reshape(-1, *parts.shape[2:])[: math.prod(like.shape[:2])].reshape(
        *like.shape[:2], *parts.shape[2:]
    )


def _over_devices(work: Callable, rules: Rules, outputs: str, *given: Array) -> Any:
    """`work(axes, *given)` on every device with its part of the arrays.

    Args:
      work: from what one device holds to its results, put together.
      rules: axis name -> mesh axes.
      outputs: the kind of each result, by a letter: `s` a sum, `r` one number a sequence, `x` like
        the features, `h` like the head.
      *given: features, head, targets and weights.
    """
    features, head, _, _ = given
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return work(_Axes(), *given)
    stream = fitting_spec(("batch", "length", "width"), features.shape, rules)
    used = fitting_spec(("width", "vocab"), head.shape, rules)
    kept = fitting_spec(("embed", "vocab"), head.shape, rules)
    sequences = PartitionSpec(*stream[:2])
    tokens = mesh_axes(*sequences)
    axes = _Axes(
        tokens,
        mesh_axes(sequences[1]),
        mesh_axes(used[1]),
        tuple(name for name in mesh_axes(kept[0]) if name in tokens),
    )
    specs = {
        "s": PartitionSpec(),
        "r": PartitionSpec(sequences[0]),
        "x": stream,
        "h": PartitionSpec(axes.kept or None, used[1]),
    }
    placed = jax.shard_map(
        functools.partial(work, axes),
        in_specs=(stream, used, sequences, sequences),
        out_specs=tuple(specs[letter] for letter in outputs),
        check_vma=False,
    )
    return placed(*given)


def _whole_head_gradient(d_head: Array, axes: _Axes) -> Array:
    """The sum of all devices' gradients of the head, left split by rows where its weight
    is.
    """
    if axes.kept:
        d_head = lax.psum_scatter(d_head, axes.kept, scatter_dimension=0, tiled=True)
    return _sum(d_head, tuple(name for name in axes.tokens if name not in axes.kept))


_Sums = tuple[Float[Array, ""], Float[Array, ""]]  # of the losses, and of the z-losses


def _add(sums: _Sums, scores: _Scores, weight: Array, z_loss: float) -> _Sums:
    """Adds a chunk, weighted; nothing is computed for a z-loss that is off."""
    loss, z = sums
    return loss + jnp.sum(weight * scores.losses), z + (
        z_loss * jnp.sum(weight * jnp.square(scores.log_z)) if z_loss else 0
    )


def _zero_sums() -> _Sums:
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def cross_entropy_and_z(
    features: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    z_loss: float,
    rules: Rules = TRAINING,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of weight * -log p(target), and sum of weight * z_loss * log(Z)^2, in nats, float32.

    The first carries the gradients of both, so that the reported loss stays the cross-entropy; the
    second carries none.

    Args:
      features: normed stream, ready for the head.
      head: output matrix.
      targets: the token to be predicted at each position.
      weights: 0 leaves a position out.
      chunk: tokens of one device whose logits exist at one time.
      z_loss: coefficient; 0 for the cross-entropy alone, at no cost.
      rules: axis name -> mesh axes, for a mesh set by `jax.set_mesh`.
    """

    def sums(axes: _Axes, features: Array, head: Array, targets: Array, weights: Array) -> _Sums:
        """Of all tokens, by one device's sweep over its own."""

        def add(totals: _Sums, piece: _Tokens) -> tuple[_Sums, None]:
            """Adds the losses of a chunk."""
            part, target, weight = piece
            return _add(totals, _scores(part, head, target, axes), weight, z_loss), None

        totals = lax.scan(add, _zero_sums(), _cut(features, targets, weights, chunk))[0]
        return _sum(totals[0], axes.tokens), _sum(totals[1], axes.tokens)

    return _over_devices(sums, rules, "ss", features, head, targets, weights)


def _cross_entropy_forward(
    features: Array,
    head: Array,
    targets: Array,
    weights: Array,
    chunk: int,
    z_loss: float,
    rules: Rules,
) -> tuple[_Sums, tuple[Array, Array]]:
    def sweep(
        axes: _Axes, features: Array, head: Array, targets: Array, weights: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Sums of all tokens, gradients of one device's features, and of the head."""

        def add(carry: tuple[_Sums, Array], piece: _Tokens) -> tuple[tuple[_Sums, Array], Array]:
            """Adds the losses of a chunk and its part of the head's gradient; gives the gradient of
            its features.
            """
            totals, d_head = carry
            part, target, weight = piece
            scores = _scores(part, head, target, axes)
            d_logits, d_part = _gradients(scores, head, weight, axes, z_loss)
            d_head += lax.dot_general(
                part, d_logits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )
            return (_add(totals, scores, weight, z_loss), d_head), d_part.astype(part.dtype)

        start = (_zero_sums(), jnp.zeros(head.shape, jnp.float32))
        pieces = _cut(features, targets, weights, chunk)
        # The last chunk by itself: the cast of the head's gradient is then a part of its product,
        # not another pass over it.
        before, last = (
            jax.tree.map(lambda x, part=part: x[part], pieces) for part in (slice(-1), -1)
        )
        carry, parts = (
            lax.scan(add, start, before) if len(pieces[1]) > 1 else (start, pieces[0][:0])
        )
        ((loss, z), d_head), part = add(carry, last)
        d_head = _whole_head_gradient(d_head.astype(head.dtype), axes)
        d_features = _joined(jnp.concatenate([parts, part[None]]), features)
        return _sum(loss, axes.tokens), _sum(z, axes.tokens), d_features, d_head

    loss, z, d_features, d_head = _over_devices(
        sweep, rules, "ssxh", features, head, targets, weights
    )
    return (loss, z), (d_features, d_head)


def _cross_entropy_backward(
    chunk: int, z_loss: float, rules: Rules, saved: tuple[Array, Array], scales: tuple[Array, Array]
) -> tuple:
    d_features, d_head = saved
    scale, _ = scales
    return (
        (d_features * scale).astype(d_features.dtype),
        (d_head * scale).astype(d_head.dtype),
        None,
        None,
    )


cross_entropy_and_z.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def cross_entropy(
    features: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    rules: Rules = TRAINING,
) -> Float[Array, ""]:
    """Sum of weight * -log p(target), in nats, float32; arguments as for `cross_entropy_and_z`."""
    return cross_entropy_and_z(features, head, targets, weights, chunk, 0.0, rules)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def sequence_losses(
    features: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    chunk: int,
    rules: Rules = TRAINING,
) -> Float[Array, " B"]:
    """Sum of weight * -log p(target) of each sequence, in nats, float32, under a frozen head: no
    gradient of it is formed.

    Args:
      features: normed stream, ready for the head; the only argument that gradients reach.
      head: output matrix, a constant.
      targets: the token to be predicted at each position.
      weights: 0 leaves a position out.
      chunk: tokens of one device whose logits exist at one time.
      rules: axis name -> mesh axes, for a mesh set by `jax.set_mesh`.
    """

    def sweep(
        axes: _Axes, features: Array, head: Array, targets: Array, weights: Array
    ) -> tuple[Array]:
        """Each sequence's sum, by one device's sweep over its own tokens."""

        def losses(_: None, piece: _Tokens) -> tuple[None, Array]:
            """Weighted losses of a chunk."""
            part, target, weight = piece
            return None, weight * _scores(part, head, target, axes).losses

        return (
            _sequence_sums(
                lax.scan(losses, None, _cut(features, targets, weights, chunk))[1], targets, axes
            ),
        )

    return _over_devices(sweep, rules, "r", features, head, targets, weights)[0]


def _sequence_sums(losses: Array, like: Array, axes: _Axes) -> Array:
    """Chunks of weighted losses summed by sequence, over every device that has a part of the
    sequence.
    """
    return _sum(jnp.sum(_joined(losses, like), axis=1), axes.length)


def _sequence_losses_forward(
    features: Array, head: Array, targets: Array, weights: Array, chunk: int, rules: Rules
) -> tuple[Array, Array]:
    def sweep(
        axes: _Axes, features: Array, head: Array, targets: Array, weights: Array
    ) -> tuple[Array, Array]:
        """Each sequence's sum and the gradients of the features."""

        def losses(_: None, piece: _Tokens) -> tuple[None, tuple[Array, Array]]:
            """Weighted losses of a chunk; gives the gradient of its features."""
            part, target, weight = piece
            scores = _scores(part, head, target, axes)
            return None, (
                weight * scores.losses,
                _gradients(scores, head, weight, axes)[1].astype(part.dtype),
            )

        each, parts = lax.scan(losses, None, _cut(features, targets, weights, chunk))[1]
        return _sequence_sums(each, targets, axes), _joined(parts, features)

    return _over_devices(sweep, rules, "rx", features, head, targets, weights)


def _sequence_losses_backward(chunk: int, rules: Rules, d_features: Array, scales: Array) -> tuple:
    return (d_features * scales[:, None, None]).astype(d_features.dtype), None, None, None


sequence_losses.defvjp(_sequence_losses_forward, _sequence_losses_backward)
