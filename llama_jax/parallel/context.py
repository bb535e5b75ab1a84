"""A sequence over devices: which tokens each of them holds, and the residual stream between blocks.

Attention of a causal row has little to do for its first tokens and much for its last ones. So a row is cut into `2C` chunks
for `C` devices, and device `i` holds chunks `i` and `2C - 1 - i`: the same work everywhere, and with keys that go round
(arXiv:2310.01889, arXiv:2311.09431) in every round. Only token numbers are moved to that order, once a batch; everything
else goes by the positions of tokens.
"""

import math

import jax
import numpy as np

from llama_jax.axes import Array
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import Rules, constrain


def parts_of(axis: str, rules: Rules) -> int:
    """In how many parts the mesh set by `jax.set_mesh` cuts an axis; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in dict(rules)[axis])


def whole_rows(rules: Rules) -> Rules:
    """The rules for generation: a row's few new tokens stay together, whatever the mesh."""
    return tuple((axis, () if axis in ("length", "stream_length") else mesh_axes) for axis, mesh_axes in rules)


def require_divisible(name: str, size: int, parts: int) -> None:
    """Refuses what devices cannot share.

    Args:
      name: of what is to be cut.
      size: of it.
      parts: in which it is to be cut.

    Raises:
      InputError: with the size, and what it should be a multiple of.
    """
    if size % parts:
        raise InputError(
            f"{name}: {size} given, a multiple of {parts} expected, for the devices of the mesh to share it; "
            "choose another or a smaller mesh"
        )


def balanced_positions(length: int, parts: int) -> np.ndarray:
    """Position of each token when devices hold equal shares of causal work, device by device, `[T]` int32.

    Args:
      length: tokens of a row, a multiple of `2 * parts`.
      parts: devices that share a row.

    Raises:
      InputError: for a length that does not divide.
    """
    require_divisible("length", length, 2 * parts)
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    pairs = [(device, 2 * parts - 1 - device) for device in range(parts)]
    return chunks[np.array(pairs).ravel()].reshape(length)


def _stream_axes(length: int, rules: Rules) -> tuple[str, ...]:
    """Axis names of the stream between blocks: as inside of them where more parts do not divide the length."""
    return ("batch", "length" if length % parts_of("stream_length", rules) else "stream_length", "width")


def constrain_stream(x: Array, rules: Rules) -> Array:
    """Pins the residual stream `[B, T, D]` between blocks, where it is cut over `tensor` too (arXiv:2205.05198).

    What a row-parallel product leaves to be summed is scattered with it, and norms and what is kept for the backward pass
    are shared instead of repeated.
    """
    return constrain(x, _stream_axes(x.shape[1], rules), rules)


def enter_block(x: Array, rules: Rules) -> Array:
    """The normed stream `[B, T, D]` gathered for column-parallel products; as it is where the stream is not cut any finer.

    The first constraint is for the gradient, which it brings back cut (reduce-scattered).
    """
    axes = _stream_axes(x.shape[1], rules)
    if parts_of(axes[1], rules) == parts_of("length", rules):
        return x
    return constrain(constrain(x, axes, rules), ("batch", "length", "width"), rules)
