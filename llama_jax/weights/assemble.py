"""From a source of single tensors to the one parameter tree, stacked or unrolled."""

from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from llama_jax.axes import Parameters
from llama_jax.weights.source import Shape, Source, flat_shapes

Place = Callable[[str, np.ndarray], jax.Array]

_STRIP = 64  # columns copied at a time: a transposed copy in strips stays in the cache and is 3 to 7 times as fast


def on_default_device(name: str, tensor: np.ndarray) -> jax.Array:
    """The default placement: the whole tensor on JAX's default device."""
    return jnp.asarray(tensor)


def assemble(
    source: Source, form: Literal["stacked", "unrolled"], dtype: DTypeLike, place: Place = on_default_device
) -> Parameters:
    """Reads every tensor of a source into a parameter tree.

    Args:
      source: the weights, tensor by tensor.
      form: `stacked` has the layers on a leading axis below `layers`; `unrolled` has `layers_0`, `layers_1`, ...
      dtype: type of the result's arrays.
      place: from a path of the tree and a host array to a device array. The host array is not used again.

    Returns:
      The tree, nested dicts. On the host, one of its (stacked) tensors exists at a time beside the placed ones.
    """
    read = _stacked if form == "stacked" else _unrolled
    flat: dict[str, jax.Array] = {}
    for path, shape in flat_shapes(source.config).items():
        flat.update((name, place(name, tensor)) for name, tensor in read(source, path, shape, np.dtype(dtype)))
    return unflatten_dict(flat, sep="/")


def _stacked(source: Source, path: str, shape: Shape, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    tensor = np.empty(shape, dtype)
    if path.startswith("layers/"):
        for layer in range(source.config.layers):
            _copy(source.read(path, layer), tensor[layer])
    else:
        _copy(source.read(path, None), tensor)
    yield path, tensor


def _unrolled(source: Source, path: str, shape: Shape, dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    if not path.startswith("layers/"):
        yield from _stacked(source, path, shape, dtype)
        return
    for layer in range(source.config.layers):
        tensor = np.empty(shape[1:], dtype)
        _copy(source.read(path, layer), tensor)
        yield path.replace("layers", f"layers_{layer}", 1), tensor


def _copy(tensor: np.ndarray, destination: np.ndarray) -> None:
    """Copies with a cast, so that nothing placed refers to the file."""
    for start in range(0, tensor.shape[-1], _STRIP):
        destination[..., start : start + _STRIP] = tensor[..., start : start + _STRIP]
