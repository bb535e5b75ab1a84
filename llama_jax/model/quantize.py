"""Weights in 8 or 4 bits: a transformation of the parameter tree, and the leaves that take the
place of matrices.

A quantised matrix is a matrix of 8-bit integers and one scale an output channel. In 4 bits the
integers are themselves products: a 4-bit number a weight times a small integer a group of weights
of the same channel, so that both widths are multiplied in the same way, integers first and the
scale last, and a group costs a quarter of a bit a weight. Channels come first, in rows of their
inputs: the order of an embedding table, and the one
  in which XLA's CPU compiler reads quantized weights
inside a product of one row instead of widening them in memory.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from llama_jax.axes import Array, Float, Int, Parameters, PyTree
from llama_jax.errors import InputError

_LOW, _HIGH = -8, 7  # a 4-bit number
_MULTIPLIER = 15  # largest multiplier of a group: 8 * 15 still is an 8-bit integer
_EIGHT_BITS = (
    "embedding",
    "head",
)  # these hold 8 bits at least: every token's logits go through them


class Quantized(NamedTuple):
    """A matrix in 8-bit integers, `O` channels of `I` inputs, or such matrices stacked on a
    leading axis `L`.

    Attributes:
      values: `int8` integers `[O, I]`; or `uint8` `[O, I/2]`, two neighbouring 4-bit numbers (each
        plus 8) a byte, the first in the low bits.
      scales: one a channel, float32.
      multipliers: with 4-bit numbers, the integer of each group of `I / groups` inputs of a
        channel; else `None`.
    """

    values: Int[Array, "*L O P"]
    scales: Float[Array, "*L O 1"]
    multipliers: Int[Array, "*L O groups"] | None = None


Weight = Array | Quantized


def integers(weight: Quantized) -> Int[Array, "*L O I"]:
    """The matrix before its scales, `int8`."""
    packed, multipliers = weight.values, weight.multipliers
    if multipliers is None:
        return packed
    numbers = jnp.stack([packed & 15, packed >> 4], axis=-1).astype(jnp.int8) + _LOW
    return (numbers.reshape(*multipliers.shape, -1) * multipliers[..., None]).reshape(
        *packed.shape[:-1], -1
    )


def dequantize(weight: Quantized) -> Float[Array, "*L O I"]:
    """The matrix written out, float32, channels first."""
    return integers(weight).astype(jnp.float32) * weight.scales


def take_embeddings(table: Weight, tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    """Rows of an embedding table; only the rows taken are dequantised."""
    if not isinstance(table, Quantized):
        return jnp.take(table, tokens, axis=0)
    return jnp.take(table.values, tokens, axis=0).astype(jnp.float32) * jnp.take(
        table.scales, tokens, axis=0
    )


def _steps(x: Array, size: Array) -> Array:
    """`x / size`, and 0 where the size is 0."""
    return x / jnp.where(size == 0, 1.0, size)


@jax.jit
def _eight_bits(matrix: Float[Array, "*L O I"]) -> Quantized:
    """Symmetric: within half a scale of the matrix."""
    wide = matrix.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    return Quantized(jnp.round(_steps(wide, scales)).astype(jnp.int8), scales)


def _numbers(grouped: Array, size: Array) -> Array:
    """The 4-bit numbers nearest to `grouped / size`."""
    return jnp.clip(jnp.round(_steps(grouped, size)), _LOW, _HIGH)


def _best_multipliers(
    grouped: Float[Array, "O groups g"], scales: Float[Array, "O 1 1"]
) -> Float[Array, "O groups 1"]:
    """For each group the multiplier, of either sign, that leaves the smallest squared error: there
    are only 30 to try.
    """

    def attempt(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        """Keeps multiplier number `i` where it is better."""
        multiplier = jnp.where(i < _MULTIPLIER, i + 1, _MULTIPLIER - 1 - i).astype(jnp.float32)
        size = multiplier * scales
        error = jnp.sum((grouped - size * _numbers(grouped, size)) ** 2, axis=-1, keepdims=True)
        return jnp.where(error < best[0], error, best[0]), jnp.where(
            error < best[0], multiplier, best[1]
        )

    shape = (*grouped.shape[:2], 1)
    return lax.fori_loop(0, 2 * _MULTIPLIER, attempt, (jnp.full(shape, jnp.inf), jnp.ones(shape)))[
        1
    ]


def _four_bits(matrix: Float[Array, "O I"], group: int) -> Quantized:
    """One matrix: scales such that the largest weight of a channel is the largest number of either
    sign.
    """
    grouped = matrix.astype(jnp.float32).reshape(matrix.shape[0], -1, group)
    scales = jnp.max(jnp.abs(grouped), axis=(1, 2), keepdims=True) / (_HIGH * _MULTIPLIER)
    multipliers = _best_multipliers(grouped, scales)
    numbers = (
        (_numbers(grouped, multipliers * scales) - _LOW).astype(jnp.uint8).reshape(matrix.shape)
    )
    return Quantized(
        numbers[:, 0::2] | numbers[:, 1::2] << 4,
        scales[..., 0],
        multipliers[..., 0].astype(jnp.int8),
    )


@functools.partial(jax.jit, static_argnames="group")
def _four_bits_each(matrix: Float[Array, "*L O I"], group: int) -> Quantized:
    """`_four_bits` of one matrix, or of stacked ones one after the other (the search takes several
    times their memory).
    """
    one = functools.partial(_four_bits, group=group)
    return one(matrix) if matrix.ndim == 2 else lax.map(one, matrix)


def _quantize_leaf(name: str, leaf: Array, bits: int, group: int) -> Weight:
    """What takes the place of one array of the tree, by the last part of its path."""
    if name == "scale":
        return leaf
    channels = leaf if name == "embedding" else leaf.swapaxes(-1, -2)
    if bits == 8 or name in _EIGHT_BITS:
        return _eight_bits(channels)
    if channels.shape[-1] % group:
        raise InputError(
            f"groups of {group} weights do not divide the {channels.shape[-1]} inputs of "
            f"{name}; give another group"
        )
    return _four_bits_each(channels, group)


def quantize(params: Parameters, bits: int = 8, group: int = 32) -> Parameters:
    """The same model in quantized weights: every matrix becomes `Quantized`, norms stay as they
    are.

    8 bits take a quarter of float32 and 4 bits an eighth; activations stay floats. The embedding
    table and the head keep 8 bits in both. The result goes wherever parameters go to be run
    (`logits`, `Generator`, ...); it is not for training.

    Args:
      params: a parameter tree, stacked or unrolled, in any float type.
      bits: 8, one scale an output channel; or 4, with another small multiplier for each group of
        weights.
      group: weights in a group, an even divisor of the inputs of every matrix.

    Raises:
      InputError: for another number of bits, a group that does not fit, and a tree that is
        quantised already or adapted.
    """
    finish = leaf_quantizer(bits, group)
    if any(
        isinstance(leaf, Quantized)
        for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    ):
        raise InputError(
            "the parameters are quantised already; quantize the ones they were made from"
        )
    if not all(
        isinstance(path[-1], jax.tree_util.DictKey)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ):
        raise InputError(
            "parameters with adapters over them given; quantize the plain ones, then "
            "combine these with the adapters"
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: finish(str(path[-1].key), leaf), params
    )


def leaf_quantizer(bits: int = 8, group: int = 32) -> Callable[[str, Array], Weight]:
    """`quantize` for one array at a time, from its path and the array: `finish` of
    `llama_jax.load`.

    Raises:
      InputError: as `quantize`, for the arguments here and for an array there.
    """
    if bits not in (4, 8):
        raise InputError(f"bits: {bits} given; 8 or 4 expected")
    if group < 2 or group % 2:
        raise InputError(f"group: {group} given; an even number of weights expected")
    return lambda path, leaf: _quantize_leaf(path.rpartition("/")[2], leaf, bits, group)


def parameter_bytes(params: PyTree) -> int:
    """Bytes of all arrays of a tree: parameters in any form, or a cache."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
