"""A checksum of an array that does not depend on how the array is laid out over devices.

Every element is mixed with its position and the results are added modulo 2^32; sums commute, so any sharding gives the
same value and each device reads only its own part. Two sums with different mixing make 64 bits. Within a sum the mixing
is a bijection of the element, so a change of one element always changes it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from llama_jax.axes import Array, PyTree, Shaped, UInt32

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def checksums(tree: PyTree) -> dict[str, str]:
    """Checksum of every array of a tree, as 16 hexadecimal digits.

    The value is part of the format of our checkpoints: the same on every device, sharding and version of JAX.

    Args:
      tree: arrays with elements of 1, 2, 4 or 8 bytes.

    Returns:
      Checksums by path; a path is `params/layers/attention/wq`.
    """
    # An array at a time: arrays of one shape share a program, whatever tree they stand in.
    sums = jax.device_get({path: _fold_whole(leaf) for path, leaf in by_path(tree).items()})
    return {path: f"{int(first):08x}{int(second):08x}" for path, (first, second) in sums.items()}


def by_path(tree: PyTree) -> dict:
    """The leaves of a tree by path; keys, indices and field names are joined by a slash."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def fold(array: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """The two sums of `checksums` for one array; stacked matrices one after the other, to save memory."""
    if array.ndim < 3:
        return _fold(array, jnp.uint32(0))
    size = math.prod(array.shape[1:]) * (2 if array.dtype.itemsize == 8 else 1)
    starts = jnp.arange(array.shape[0], dtype=jnp.uint32) * jnp.uint32(size % 2**32)
    return jnp.sum(lax.map(lambda part: _fold(*part), (array, starts)), axis=0, dtype=jnp.uint32)


def _fold(array: Array, start: Array) -> Array:
    """The sums of an array whose first element stands at place `start` of a larger one."""
    bits = _bits(array)
    place = _mix(_positions(bits.shape) + start)
    first = _mix(bits ^ place)
    second = _mix(bits * jnp.uint32(0x9E3779B1) + _mix(~place))
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


_fold_whole = jax.jit(fold)
fold_part = jax.jit(_fold)  # the sums of a part of an array add up to those of the whole, modulo 2^32


def _bits(array: Array) -> Array:
    """The bits of each element as uint32; elements of 8 bytes become two on a new last axis."""
    plain = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    return lax.bitcast_convert_type(plain, _UNSIGNED[plain.dtype.itemsize]).astype(jnp.uint32)


def _positions(shape: tuple[int, ...]) -> Array:
    """Row-major index of every element, modulo 2^32."""
    strides = [np.uint32(math.prod(shape[axis + 1 :]) % 2**32) for axis in range(len(shape))]
    indices = (lax.broadcasted_iota(jnp.uint32, shape, axis) * stride for axis, stride in enumerate(strides))
    return sum(indices, start=jnp.zeros(shape, jnp.uint32))


def _mix(bits: Array) -> Array:
    """A bijection of 32-bit words in which every input bit reaches every output bit.

    Source: the finaliser of MurmurHash3 (A. Appleby, public domain).
    """
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
