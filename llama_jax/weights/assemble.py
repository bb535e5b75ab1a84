"""From a source of single tensors to the one parameter tree, stacked or unrolled, whole or in
shards over a mesh.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey
from jax.typing import DTypeLike

from llama_jax.axes import Array, Parameters, PyTree
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import TRAINING, Rules, check_divisible, stored_spec
from llama_jax.weights.source import (
    Source,
    blamed_on,
    flat_shapes,
    of_layer,
    require_tensors,
    shown,
    tree_shapes,
)

Form = Literal["stacked", "unrolled"]

# What becomes of an array of the tree when it is there: from its path in the tree and the array to
# what takes its place.
Finish = Callable[[str, jax.Array], PyTree]

Unchecked = Any  # an argument of any type, which is looked at first

_DTYPES = ("float32", "bfloat16", "float16", "float64")
# columns copied at a time: a transposed copy in strips stays in the cache and is 3 to 7 times as
# fast
_STRIP = 64
_ALIGNMENT = 64  # bytes; what XLA's CPU client asks of an array that it is to use without a copy


def as_it_is(path: str, array: jax.Array) -> jax.Array:
    """Leaves an array of the tree as it is."""
    return array


def check_form(form: Unchecked, dtype: Unchecked) -> None:
    """Refuses forms that there are not, and types that weights cannot have: whole numbers would be
    zeros.

    Raises:
      InputError: with what there is.
    """
    if form not in get_args(Form):
        raise InputError(f"form: {shown(form)} given; {' or '.join(get_args(Form))} expected")
    try:
        known = dtype is not None and np.dtype(dtype).name in _DTYPES
    except TypeError:
        known = False
    if not known:
        raise InputError(
            f"dtype: {shown(dtype)} given; one of {', '.join(_DTYPES)} expected; fewer "
            "bits come of quantize"
        )


def assemble(
    source: Source,
    form: Form,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    rules: Rules = TRAINING,
    finish: Finish = as_it_is,
) -> Parameters:
    """Reads every tensor of a source into a parameter tree.

    On the host, one tensor of one layer exists at a time; on the devices, beside the tree, the same
    one at most.

    Args:
      source: the weights, tensor by tensor.
      form: `stacked` has the layers on a leading axis below `layers`; `unrolled` has `layers_0`,
        `layers_1`, ...
      dtype: type of the result's arrays.
      mesh: the devices over which each tensor is laid out, shard by shard; JAX's default device
        where `None`.
      rules: axis name -> mesh axes, for `mesh`.
      finish: called with each array of the tree as it comes, before the next is read; what it
        returns takes its place.

    Returns:
      The tree, nested dicts.

    Raises:
      InputError: for a mesh whose axes do not divide the model, and another form or dtype than
        there are.
    """
    check_form(form, dtype)
    shardings = _shardings(source, mesh, rules)
    flat: dict[str, PyTree] = {}
    for path in flat_shapes(source.config):
        read = _stacked if form == "stacked" and _layered(path) else _one_by_one
        flat |= read(
            source,
            path,
            np.dtype(dtype),
            shardings.get(path),
            lambda *leaf: jax.block_until_ready(finish(*leaf)),
        )
    return unflatten_dict(flat, sep="/")


def _layered(path: str) -> bool:
    return path.startswith("layers/")


def _shardings(source: Source, mesh: Mesh | None, rules: Rules) -> dict[str, NamedSharding]:
    """Where each tensor lives, by path, without the axis of the layers; empty where there is no
    mesh.
    """
    if mesh is None:
        return {}
    check_divisible(source.config, mesh, rules)
    shapes = {
        path: shape[1:] if _layered(path) else shape
        for path, shape in flat_shapes(source.config).items()
    }
    return {path: parameter_sharding(path, shape, mesh, rules) for path, shape in shapes.items()}


def parameter_sharding(
    path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> NamedSharding:
    """Where a parameter lives by the table of `parallel.sharding`.

    Args:
      path: of the parameter, such as `layers/attention/wq`.
      shape: of the array; with one dimension more than a matrix has, layers are stacked on the
        leading axis.
      mesh: the devices.
      rules: axis name -> mesh axes.
    """
    keys = tuple(map(DictKey, path.split("/")))
    return NamedSharding(mesh, stored_spec(keys, shape, rules, mesh.shape))


def _one_by_one(
    source: Source, path: str, dtype: np.dtype, sharding: NamedSharding | None, finish: Finish
) -> dict[str, PyTree]:
    """The arrays of a path by name: one, or one a layer."""
    if not _layered(path):
        return {path: finish(path, _placed(_copied(source.read(path, None), dtype), sharding))}
    names = {
        path.replace("layers", f"layers_{layer}", 1): layer for layer in range(source.config.layers)
    }
    return {
        name: finish(name, _placed(_copied(source.read(path, layer), dtype), sharding))
        for name, layer in names.items()
    }


def _stacked(
    source: Source, path: str, dtype: np.dtype, sharding: NamedSharding | None, finish: Finish
) -> dict[str, PyTree]:
    """The one array of a path, filled in place layer by layer."""
    above = sharding and NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    stacked = jnp.zeros(flat_shapes(source.config)[path], dtype, device=above)
    fill = jax.jit(
        jax.lax.dynamic_update_index_in_dim, donate_argnums=0, static_argnums=3, out_shardings=above
    )
    for layer in range(source.config.layers):
        tensor = _placed(_copied(source.read(path, layer), dtype), sharding)
        stacked = jax.block_until_ready(fill(stacked, tensor, np.int32(layer), 0))
    return {path: finish(path, stacked)}


def _placed(tensor: np.ndarray, sharding: NamedSharding | None) -> Array:
    """A host array on the devices; waits until it is there, so that not two of them are on their
    way at a time.
    """
    if sharding is None:
        return jax.block_until_ready(jax.device_put(tensor))
    return jax.block_until_ready(
        jax.make_array_from_callback(tensor.shape, sharding, lambda index: tensor[index])
    )


def _copied(tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A contiguous copy with a cast: nothing placed refers to the file. Aligned so that on a CPU
    JAX takes it as it is.
    """
    nbytes = tensor.size * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    copy = memory[start : start + nbytes].view(dtype).reshape(tensor.shape)
    for start in range(0, tensor.shape[-1], _STRIP):
        copy[..., start : start + _STRIP] = tensor[..., start : start + _STRIP]
    return copy


# --- forms ---
#
# The two forms of the one parameter tree: layers stacked on a leading axis, or one subtree a layer.
#
# Stacked is canonical, on disk and in training; unrolled is what decoding runs fastest on. Both
# hold the same numbers.


def stack(params: Parameters) -> Parameters:
    """The stacked form of an unrolled parameter tree (layers on a leading axis); a stacked tree
    comes back as it is.
    """
    if "layers" in params:
        return params
    names = sorted(
        (name for name in params if name.startswith("layers_")),
        key=lambda name: int(name.split("_")[1]),
    )
    rest = {name: value for name, value in params.items() if name not in names}
    return {
        **rest,
        "layers": jax.tree.map(
            lambda *leaves: jnp.stack(leaves), *[params[name] for name in names]
        ),
    }


def unstack(params: Parameters) -> Parameters:
    """The unrolled form (`layers_0`, `layers_1`, ...) of a stacked parameter tree; an unrolled tree
    comes back as it is.
    """
    if "layers" not in params:
        return params
    rest = {name: value for name, value in params.items() if name != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return rest | {
        f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        for i in range(count)
    }


def unrolled(path: str, leaf: Array) -> Iterator[tuple[str, Array]]:
    """One leaf of the stacked form as it is in the unrolled one, with its paths: `layers_0/a`, ...
    for `layers/a`.
    """
    if not path.startswith("layers/"):
        yield path, leaf
        return
    for layer in range(leaf.shape[0]):
        yield path.replace("layers", f"layers_{layer}", 1), leaf[layer]


# --- parameter source ---
#
# Sources that are no file: parameters in memory, and a source that is watched while it is read.


class ParameterSource:
    """A parameter tree in memory as a `Source`, whichever its form.

    Attributes:
      config: the architecture of the parameters.

    Raises:
      InputError: if the tree is not one of this architecture, counting and naming what is missing,
        too much or misshapen.
    """

    def __init__(self, config: LlamaConfig, params: Parameters) -> None:
        self.config = config
        self._stacked = "layers" in params
        self._arrays: dict[str, Any] = flatten_dict(params, sep="/")
        with blamed_on("parameters"):
            strange = [
                name
                for name, leaf in self._arrays.items()
                if not isinstance(leaf, jax.Array | np.ndarray)
            ]
            if strange:
                raise InputError(
                    f"{strange[0]} is a {type(self._arrays[strange[0]]).__name__}; an "
                    "array expected"
                )
            require_tensors(
                tree_shapes(config, self._stacked),
                {name: leaf.shape for name, leaf in self._arrays.items()},
            )

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor on the host; see `Source.read`. Of a stacked tree, only that layer is copied
        from the device.
        """
        if layer is None:
            return np.asarray(self._arrays[name])
        return np.asarray(
            self._arrays[name][layer] if self._stacked else self._arrays[of_layer(name, layer)]
        )


@dataclasses.dataclass(frozen=True)
class WatchedSource:
    """A source that reports the progress of reading.

    Attributes:
      source: the source to read.
      watcher: called after each tensor with its number of parameters.
    """

    source: Source
    watcher: Callable[[int], None]

    @property
    def config(self) -> LlamaConfig:
        """The architecture of the source."""
        return self.source.config

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor; see `Source.read`."""
        tensor = self.source.read(name, layer)
        self.watcher(tensor.size)
        return tensor
