"""The one product of activations and weights, in the form that is fast where it runs.

Accelerators dequantize quantized weights on their way to the matmul. On GPUs one row is filled up
to eight, for which there are faster programs. XLA's CPU compiler writes the widened weights to
memory first, every time, with two exceptions that this module keeps to. One row times rows of
channels (`[O, I]`, transposed in so many words) is a single loop that widens as it reads. And it
multiplies rows of the weights' own type, two or more: so the activations are split into
low-precision parts that add up to them (`x = a + b + c`, exactly to rounding), which are rows of
one product: bfloat16 parts for bfloat16 weights, 8-bit integers for 8-bit integers.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from llama_jax.axes import Array, Float, Int, Shaped
from llama_jax.model.lora import Adapted, Matrix, dropped
from llama_jax.model.quantize import Quantized, Weight, integers

_FEW_ROWS = (
    16  # with more rows, widening the weights costs less than multiplying them by three parts
)
_FULL_ROWS = 8  # the fewest that a GPU's matrix unit multiplies
# the error of rounding to an 8-bit integer is at most 1/2, so 254 times it is an 8-bit integer
# again
_BASE = 254


def _dot(
    x: Shaped[Array, "*B I"], matrix: Shaped[Array, "..."], axis: int, dtype: DTypeLike
) -> Array:
    """Contracts the last axis of `x` with `axis` of a matrix, summed and returned in `dtype`."""
    contraction = (((x.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(x, matrix, contraction, preferred_element_type=jnp.dtype(dtype))


def _split_float(x: Float[Array, "M I"], dtype: DTypeLike) -> list[Array]:
    """Parts in a low-precision float type whose sum is `x`: itself, or three for the 24 bits of a
    float32.
    """
    if x.dtype == dtype:  # one row wants company
        return [x] if x.shape[0] > 1 else [x, jnp.zeros_like(x)]
    parts = []
    for _ in range(3):
        parts.append(x.astype(dtype))
        x = x - parts[-1].astype(x.dtype)
    return parts


def _float_parts(
    x: Float[Array, "M I"], matrix: Float[Array, "..."], axis: int, dtype: DTypeLike
) -> Float[Array, "M O"]:
    """`x` times a low-precision float matrix, without a float32 copy of the matrix."""
    if axis == 1 and x.shape[0] == 1:
        return _one_row(x, matrix).astype(dtype)
    parts = _split_float(x, matrix.dtype)
    out = _dot(jnp.concatenate(parts), matrix, axis, jnp.float32)
    return out.reshape(len(parts), x.shape[0], -1).sum(0).astype(dtype)


def _one_row(x: Float[Array, "1 I"], weight: Weight) -> Float[Array, "1 O"]:
    """One row times `[O, I]` in float32, by the loop that widens as it reads.

    The barrier ties the weight to `x`, or XLA widens all weights at once before the loop of
    decoding steps.
    """
    x, weight = lax.optimization_barrier((x.astype(jnp.float32), weight))
    return _plain(x, integers(weight) if isinstance(weight, Quantized) else weight, 1, jnp.float32)


def _filled_up(
    x: Float[Array, "1 I"], matrix: Shaped[Array, "..."], axis: int, dtype: DTypeLike
) -> Float[Array, "1 O"]:
    """One row times a matrix as eight rows, of which seven are zeros: summed up, not cut off, or
    XLA would cut the product.
    """
    rows = jnp.pad(x, ((0, _FULL_ROWS - 1), (0, 0)))
    return jnp.sum(
        _dot(rows, matrix.astype(x.dtype), axis, jnp.float32), axis=0, keepdims=True
    ).astype(dtype)


def _quantized_on_gpu(x: Float[Array, "M I"], weight: Quantized) -> Float[Array, "M O"]:
    """`x` times the integers of a weight, float32."""
    if x.shape[0] == 1:
        return _filled_up(x, integers(weight), 1, jnp.float32)
    return _dot(x, integers(weight).astype(x.dtype), 1, jnp.float32)


@jax.custom_jvp
def _integer_parts(x: Float[Array, "M I"], matrix: Int[Array, "O I"]) -> Float[Array, "M O"]:
    """`x` times an 8-bit integer matrix, float32; sums are exact integers.

    Three parts hold `x` to 2^-24 of the largest entry of its row, two (for narrower types) to
    2^-16.
    """
    count = 3 if x.dtype == jnp.float32 else 2
    wide = x.astype(jnp.float32)
    size = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / 127
    rest, parts = wide / jnp.where(size > 0, size, 1.0), []
    for _ in range(count):
        parts.append(jnp.round(rest).astype(jnp.int8))
        rest = (rest - parts[-1].astype(jnp.float32)) * _BASE
    sums = _dot(jnp.concatenate(parts), matrix, 1, jnp.int32).reshape(count, x.shape[0], -1)
    weights = jnp.asarray([float(_BASE) ** -i for i in range(count)], jnp.float32)
    return jnp.einsum("pmo,p->mo", sums.astype(jnp.float32), weights) * size


@_integer_parts.defjvp
def _integer_parts_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Rounding hides the slope; the product is linear in `x`."""
    x, matrix = primals
    return _integer_parts(x, matrix), _plain(tangents[0], matrix, 1, jnp.float32)


def _quantized_on_cpu(x: Float[Array, "M I"], weight: Quantized) -> Float[Array, "M O"]:
    """`x` times the integers of a weight, float32, without a wide copy of them where there are few
    rows.
    """
    if x.shape[0] > _FEW_ROWS:
        return _plain(x, integers(weight), 1, jnp.float32)
    return _one_row(x, weight) if x.shape[0] == 1 else _integer_parts(x, integers(weight))


def _plain(
    x: Float[Array, "*B I"], matrix: Shaped[Array, "..."], axis: int, dtype: DTypeLike
) -> Array:
    """The product with the matrix in the type of `x`. (Without the transpose written out, CPU would
    widen it in memory.)
    """
    wide = matrix.astype(x.dtype)
    return _dot(x, wide.T if axis else wide, 0, dtype)


# a backward pass widens the weights again instead of keeping the wide ones of every layer
@jax.checkpoint
def _quantized_sums(x: Float[Array, "M I"], weight: Quantized) -> Float[Array, "M O"]:
    return lax.platform_dependent(
        x,
        weight,
        cpu=_quantized_on_cpu,
        cuda=_quantized_on_gpu,
        default=lambda x, weight: _plain(x, integers(weight), 1, jnp.float32),
    )


def _quantized_matmul(
    x: Float[Array, "M I"], weight: Quantized, dtype: DTypeLike
) -> Float[Array, "M O"]:
    sums = _quantized_sums(x, weight)
    return (sums * lax.stop_gradient(weight.scales)[:, 0]).astype(dtype)


def with_adapter(x: Array, weight: Adapted, times: Callable[[Array, Weight], Array]) -> Array:
    """`x` times an adapted weight: `times(x, weight) + times(x, a) b * scale`, the low rank in
    between.

    Args:
      x: activations in the form that `times` takes.
      weight: a frozen weight and its adapter.
      times: the product of such activations and a weight that is not adapted.
    """
    low = times(dropped(x, weight.dropout), weight.a)
    # The checkpoint has a backward pass cast a frozen weight again instead of keeping it in another
    # type.
    return jax.checkpoint(times)(x, weight.weight) + product(low, weight.b) * weight.scale


def product(
    x: Float[Array, "*B I"], weight: Matrix, axis: int = 0, dtype: DTypeLike | None = None
) -> Float[Array, "*B O"]:
    """`x` times a weight matrix, plain, quantised or adapted, no wider than `x`.

    Args:
      x: activations.
      weight: plain `[I, O]`, or `[O, I]` with `axis=1`; quantised; or adapted.
      axis: the axis of a plain weight that is summed over (quantised ones have one order).
      dtype: of the result; that of `x` by default.
    """
    dtype = x.dtype if dtype is None else dtype
    if isinstance(weight, Adapted):
        return with_adapter(x, weight, functools.partial(product, dtype=dtype))
    shape, rows = x.shape[:-1], x.reshape(-1, x.shape[-1])
    if isinstance(weight, Quantized):
        return _quantized_matmul(rows, weight, dtype).reshape(*shape, -1)
    if weight.dtype != jnp.bfloat16 or math.prod(x.shape[:-1]) > _FEW_ROWS:
        # As rows where they all lie on one device: for a weight's gradient XLA's CPU compiler would
        # transpose `[B, T, O]`.
        x = rows if jax.sharding.get_abstract_mesh().size <= 1 else x
        return _plain(x, weight, axis, dtype).reshape(*shape, -1)
    few = _filled_up if rows.shape[0] == 1 else _plain
    flat = lax.platform_dependent(
        rows,
        weight,
        cpu=lambda x, matrix: _float_parts(x, matrix, axis, dtype),
        cuda=lambda x, matrix: few(x, matrix, axis, dtype),
        default=lambda x, matrix: _plain(x, matrix, axis, dtype),
    )
    return flat.reshape(*shape, -1)
