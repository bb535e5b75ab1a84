"""Sharding in two tables: parameter name -> axis names, axis name -> mesh axes.

A parameter is found by the last part of its path, so the same table serves the stacked tree, the
unrolled tree and the optimizer's moments, which repeat the tree. The rules that turn axis names
into mesh axes are a value, so that another use of the model can have others; those of training
shard weights over `fsdp`, `context` and `tensor` and gather them over the first two when used.
"""

import itertools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey
from jax.typing import DTypeLike

from llama_jax.axes import Array, PyTree
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError

PARAMETER_AXES: Mapping[str, tuple[str, ...]] = {
    "embedding": ("vocab", "embed"),
    "head": ("embed", "vocab"),
    "scale": ("norm",),
    "wq": ("embed", "heads"),
    "wk": ("embed", "kv_heads"),
    "wv": ("embed", "kv_heads"),
    "wo": ("heads", "embed"),
    "gate": ("embed", "ffn"),
    "up": ("embed", "ffn"),
    "down": ("ffn", "embed"),
}

Rules = tuple[
    tuple[str, tuple[str, ...]], ...
]  # axis name -> mesh axes; a tuple of pairs, so that modules can be hashed

# Axis names of activations: `batch`, `length`, `width` (the residual stream) and the names above;
# `stream_length` is the length of the stream between blocks, where `tensor` has nothing else to
# split (arXiv:2205.05198).
TRAINING: Rules = (
    ("batch", ("data", "fsdp")),
    ("embed", ("fsdp", "context")),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("ffn", ("tensor",)),
    ("norm", ()),
    ("layers", ()),
    ("rank", ()),
    ("length", ("context",)),
    ("stream_length", ("context", "tensor")),
    ("width", ()),
)

_GATHERED = (
    "fsdp",
    "context",
)  # mesh axes that hold parts of the weights and compute with whole ones
# Parts that are gathered should follow each other in memory: of others a TPU makes a copy, every
# time. So matrices are split by rows where they are stored, and these three, whose columns are
# gathered, are used transposed (`Attention`).
USED_TRANSPOSED = ("wq", "wk", "wv")


def partition_spec(axes: tuple[str, ...], rules: Rules) -> PartitionSpec:
    """The mesh axes of an array whose dimensions carry these axis names."""
    table = dict(rules)
    return PartitionSpec(*[table[axis] or None for axis in axes])


def parameter_spec(path: tuple, ndim: int, rules: Rules) -> PartitionSpec:
    """Where the array at a path of a parameter (or optimizer) tree lives; what is no parameter is
    replicated.

    Args:
      path: key path as given by `jax.tree_util.tree_map_with_path`.
      ndim: dimensions of the array; one more than the table says means layers stacked on a leading
        axis.
      rules: axis name -> mesh axes.
    """
    name, part = ("", *[str(getattr(key, "key", "")) for key in path])[-2:] if path else ("", "")
    adapter = name in PARAMETER_AXES and part in ("a", "b")
    axes = adapter_axes(name, part) if adapter else PARAMETER_AXES.get(part)
    if axes is None or ndim < len(axes):
        return PartitionSpec()
    return partition_spec(("layers",) * (ndim - len(axes)) + axes, rules)


def stored_spec(
    path: tuple, shape: tuple[int, ...], rules: Rules, sizes: Mapping[str, int]
) -> PartitionSpec:
    """`parameter_spec` on a mesh of these sizes, split along the side by which parts of the matrix
    are gathered.
    """
    name = str(getattr(path[-1], "key", "")) if path else ""
    return _split_along(gathered_side(name), parameter_spec(path, len(shape), rules), shape, sizes)


def gathered_side(name: str) -> int | None:
    """The side along which a matrix is split where it is stored: -2 for rows, -1 for columns;
    `None` for anything but a matrix.
    """
    if len(PARAMETER_AXES.get(name, ())) < 2:
        return None
    return -1 if name in USED_TRANSPOSED else -2


def _split_along(
    side: int | None, spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec:
    """The spec of a matrix, or of stacked ones, with one side split by what splits only what is
    stored, and not the other.

    Where the mesh does not divide that side, the spec stays as it is.
    """
    if side is None or len(spec) < 2:
        return spec
    entries = [mesh_axes(entry) for entry in spec]
    other = -3 - side
    moved = tuple(name for name in entries[other] if name in _GATHERED)
    if shape[side] % math.prod(sizes[name] for name in entries[side] + moved):
        return spec
    entries[side], entries[other] = (
        entries[side] + moved,
        tuple(name for name in entries[other] if name not in moved),
    )
    return PartitionSpec(*[names or None for names in entries])


def mesh_axes(*entries: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in entries of a spec, in order."""
    found = ((entry,) if isinstance(entry, str) else entry or () for entry in entries)
    return tuple(itertools.chain.from_iterable(found))


def adapter_axes(name: str, part: str) -> tuple[str, str]:
    """Axis names of an adapter's factors: `a` has the inputs of the weight, `b` its outputs, and
    the rank is never split.
    """
    inputs, outputs = PARAMETER_AXES[name]
    return (inputs, "rank") if part == "a" else ("rank", outputs)


def channels_first(name: str) -> tuple[str, ...]:
    """Axis names of the parts of a quantised weight: channels, then what they are summed over."""
    return PARAMETER_AXES[name] if name == "embedding" else PARAMETER_AXES[name][::-1]


def _fitting(
    spec: PartitionSpec, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> PartitionSpec:
    """The spec of a part of a quantised weight: scales and groups stay whole along an axis that the
    mesh does not divide.
    """
    counts = [math.prod(sizes[name] for name in mesh_axes(names)) for names in spec]
    return PartitionSpec(
        *[names if size % count == 0 else None for names, size, count in zip(spec, shape, counts)]
    )


def fitting_spec(axes: tuple[str, ...], shape: tuple[int, ...], rules: Rules) -> PartitionSpec:
    """The mesh axes of an array under the mesh set by `jax.set_mesh`; an axis that they do not
    divide stays whole.
    """
    return _fitting(partition_spec(axes, rules), shape, jax.sharding.get_abstract_mesh().shape)


def tree_shardings(tree: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """A `NamedSharding` for every array of a tree of parameters (quantised ones too), optimizer
    state, or both.
    """

    def sharding(path: tuple, leaf: Array | jax.ShapeDtypeStruct) -> NamedSharding:
        """That of one array; a part of a quantised weight has the weight's name just before its
        own.
        """
        name = (
            str(getattr(path[-2], "key", ""))
            if len(path) > 1 and isinstance(path[-1], GetAttrKey)
            else ""
        )
        if name not in PARAMETER_AXES:
            return NamedSharding(mesh, stored_spec(path, leaf.shape, rules, mesh.shape))
        spec = partition_spec(("layers",) * (leaf.ndim - 2) + channels_first(name), rules)
        return NamedSharding(mesh, _fitting(spec, leaf.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def optimizer_shardings(state: PyTree, params: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
    """A `NamedSharding` for every array of an optimizer's state, found by the parameter whose path
    its own path ends with.

    Arrays of the parameter's shape live where it lives; sums over one of its dimensions
    (Adafactor's) where the others do; everything else is replicated.

    Args:
      state: of an optimizer whose moments repeat the tree of parameters, arrays or shapes.
      params: the trained parameters, arrays or shapes.
      mesh: the devices.
      rules: axis name -> mesh axes.
    """
    places = {tuple(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def sharding(path: tuple, leaf: Array | jax.ShapeDtypeStruct) -> NamedSharding:
        """That of one array."""
        owner = next((path[start:] for start in range(len(path)) if path[start:] in places), None)
        if owner is None:
            return replicated(mesh)
        shape = places[owner].shape
        axes = stored_spec(owner, shape, rules, mesh.shape)
        axes = PartitionSpec(*axes, *[None] * (len(shape) - len(axes)))
        return NamedSharding(mesh, _part_spec(leaf.shape, shape, axes))

    return jax.tree_util.tree_map_with_path(sharding, state)


def _part_spec(
    shape: tuple[int, ...], whole: tuple[int, ...], spec: PartitionSpec
) -> PartitionSpec:
    """The spec of an array that repeats a whole one of a known spec, or all of it but one
    dimension, or neither.
    """
    if shape == whole:
        return spec
    for axis in reversed(range(len(whole))):
        if shape == whole[:axis] + whole[axis + 1 :]:
            return PartitionSpec(*spec[:axis], *spec[axis + 1 :])
    return PartitionSpec()


def check_divisible(config: LlamaConfig, mesh: Mesh, rules: Rules) -> None:
    """Refuses a mesh whose axes do not divide the model.

    Raises:
      InputError: naming the dimension, its size, and the mesh axes that should divide it.
    """
    table = dict(rules)
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.dim,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "ffn": config.ffn_dim,
    }
    for axis, size in sizes.items():
        parts = {name: mesh.shape[name] for name in table[axis] if mesh.shape[name] > 1}
        total = math.prod(parts.values())
        if size % total:
            raise InputError(
                f"mesh axis {'*'.join(parts)} of size {total} does not divide {axis} "
                f"({size}); choose a divisor"
            )


def constrain(x: Array, axes: tuple[str, ...], rules: Rules) -> Array:
    """Pins an activation to the mesh set by `jax.set_mesh`; without a mesh, nothing happens."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, rules))


def _in_use(rules: Rules) -> Rules:
    """The rules of weights in use: gathered over the axes that only store parts of them."""
    return tuple(
        (axis, tuple(m for m in mesh_axes if m not in _GATHERED)) for axis, mesh_axes in rules
    )


def gathered(
    weight: Array, axes: tuple[str, ...], dtype: DTypeLike, rules: Rules, side: int | None = None
) -> Array:
    """A weight shard in the compute dtype, or its own where that is smaller, gathered over `fsdp`
    and `context` for use.

    Cast first, so that the gather moves the smaller type; the transpose of the first constraint
    brings the gradient back sharded (reduce-scattered), which the compiler does not do by itself.
    On one device there is nothing to gather, and a constraint would be one more copy of the weights
    of all layers, kept by the scan for the backward pass.

    Args:
      weight: as it is stored.
      axes: axis names.
      dtype: to compute in.
      rules: axis name -> mesh axes.
      side: along which it is stored in parts, by `gathered_side`.
    """
    narrow = weight.astype(dtype) if weight.dtype.itemsize >= jnp.dtype(dtype).itemsize else weight
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return narrow
    stored = _split_along(side, partition_spec(axes, rules), narrow.shape, mesh.shape)
    return constrain(jax.lax.with_sharding_constraint(narrow, stored), axes, _in_use(rules))


def gathered_part(part: Array, axes: tuple[str, ...], rules: Rules) -> Array:
    """A part of a quantised weight (integers, scales or multipliers) in its own type, gathered for
    use.
    """
    mesh = jax.sharding.get_abstract_mesh()
    for pinned in (rules, _in_use(rules)) if mesh.size > 1 else ():
        part = jax.lax.with_sharding_constraint(
            part, _fitting(partition_spec(axes, pinned), part.shape, mesh.shape)
        )
    return part


def batch_spec(rules: Rules, leading: int = 0) -> PartitionSpec:
    """Where the sequences of a batch live; `leading` unsharded dimensions (micro-batches) stand
    before the sequences.
    """
    return PartitionSpec(*[None] * leading, dict(rules)["batch"])


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


# --- context ---
#
# A sequence over devices: which tokens each of them holds, and the residual stream between blocks.
#
# Attention of a causal sequence has little to do for its first tokens and much for its last ones.
# So a sequence is cut into `2C` chunks for `C` devices, and device `i` holds chunks `i` and `2C - 1
# - i`: the same work everywhere, and with keys that go round (arXiv:2310.01889, arXiv:2311.09431)
#   in every round. Only token numbers are moved to that order, once a batch; everything
# else goes by the positions of tokens.


def parts_of(axis: str, rules: Rules) -> int:
    """In how many parts the mesh set by `jax.set_mesh` cuts an axis; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(name, 1) for name in dict(rules)[axis])


def whole_sequences(rules: Rules) -> Rules:
    """The rules for generation: a sequence's few new tokens stay together, whatever the mesh."""
    return tuple(
        (axis, () if axis in ("length", "stream_length") else mesh_axes)
        for axis, mesh_axes in rules
    )


def require_divisible(name: str, size: int, parts: int) -> None:
    """Refuses what devices cannot share.

    Args:
      name: of the array to cut.
      size: of it.
      parts: in which it is to be cut.

    Raises:
      InputError: with the size and its expected divisor.
    """
    if size % parts:
        raise InputError(
            f"{name}: {size} given, a multiple of {parts} expected, for the devices of "
            "the mesh to share it; "
            "choose another or a smaller mesh"
        )


def balanced_positions(length: int, parts: int) -> np.ndarray:
    """Position of each token when devices hold equal shares of causal work, device by device, `[T]`
    int32.

    Args:
      length: tokens of a sequence, a multiple of `2 * parts`.
      parts: devices that share a sequence.

    Raises:
      InputError: for a length that does not divide.
    """
    require_divisible("length", length, 2 * parts)
    chunks = np.arange(length, dtype=np.int32).reshape(2 * parts, -1)
    pairs = [(device, 2 * parts - 1 - device) for device in range(parts)]
    return chunks[np.array(pairs).ravel()].reshape(length)


def _stream_axes(length: int, rules: Rules) -> tuple[str, ...]:
    """Axis names of the stream between blocks: as inside of them where more parts do not divide the
    length.
    """
    return (
        "batch",
        "length" if length % parts_of("stream_length", rules) else "stream_length",
        "width",
    )


def constrain_stream(x: Array, rules: Rules) -> Array:
    """Pins the residual stream `[B, T, D]` between blocks, where it is cut over `tensor` too
    (arXiv:2205.05198).

    What a sequence-parallel product leaves to be summed is scattered with it, and norms and what is
    kept for the backward pass are shared instead of repeated.
    """
    return constrain(x, _stream_axes(x.shape[1], rules), rules)


def enter_block(x: Array, rules: Rules) -> Array:
    """The normed stream `[B, T, D]` gathered for column-parallel products; as it is where the
    stream is not cut any finer.

    The first constraint is for the gradient, which it brings back cut (reduce-scattered).
    """
    axes = _stream_axes(x.shape[1], rules)
    if parts_of(axes[1], rules) == parts_of("length", rules):
        return x
    return constrain(constrain(x, axes, rules), ("batch", "length", "width"), rules)
