"""The parameters of a run's newest checkpoint, one array after the other; the rest of its state is not read."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from llama_jax.axes import Array, PyTree
from llama_jax.errors import InputError
from llama_jax.parallel.sharding import TRAINING, Rules
from llama_jax.weights.assemble import parameter_sharding
from llama_jax.weights.checkpoint import read_arrays
from llama_jax.weights.checkpoint_files import Restored, newest_whole, step_manifest
from llama_jax.weights.checksum import by_path
from llama_jax.weights.manifest import groups, nest

_PARAMETERS = "params"  # the subtree of a state that inference needs

# What becomes of a parameter that has been read: from its path and the array to what takes its place in the tree, by path.
Place = Callable[[str, Array], Mapping[str, PyTree]]

_TOGETHER = 16 << 20  # bytes of small arrays that are read at a time


def _as_it_is(path: str, leaf: Array) -> dict[str, Array]:
    return {path: leaf}


def restore_parameters(
    directory: Path, dtype: jax.typing.DTypeLike | None = None, mesh: Mesh | None = None, rules: Rules = TRAINING,
    place: Place = _as_it_is,
) -> Restored:  # fmt: skip
    """The verified parameters of the newest whole checkpoint; the optimizer's state is not read.

    Nothing in the directory is changed, so a run may be writing to it. One array after the other, or several small ones, are
    read, verified, cast and placed: beside the result, no more than the largest of them is in memory. Damage that shows late
    begins anew with an older one.

    Args:
      directory: as for `Checkpoints.open`.
      dtype: to cast the parameters to; as they were saved when `None`.
      mesh: the devices to lay them out over, each shard read where it lives; the default device when `None`.
      rules: axis name -> mesh axes, for `mesh`.
      place: called with the path (such as `layers/attention/wq`) and the array of each; by default it takes its place as it is.

    Raises:
      InputError: if there is no checkpoint, or none of a state with `params`.
      CorruptError: if all are damaged.
    """
    directory = directory.absolute()

    def read(step: int) -> PyTree:
        """All parameters of one checkpoint."""
        flat: dict[str, PyTree] = {}
        for paths in _parameter_groups(directory, step):
            leaves = _restore(directory, step, paths, dtype, mesh, rules)
            while leaves:  # what has its place is let go before the next is read
                flat |= jax.block_until_ready(place(*leaves.popitem()))
        return unflatten_dict(flat, sep="/")

    newest = newest_whole(directory, read)
    if newest is None:
        raise InputError(f"{directory}: no checkpoint there, the checkpoints of a run expected")
    return newest


def _restore(
    directory: Path, step: int, paths: Sequence[str], dtype: jax.typing.DTypeLike | None, mesh: Mesh | None, rules: Rules
) -> dict[str, Array]:
    """Verified parameters of one checkpoint by their paths."""
    manifest = step_manifest(directory, step)
    like = {}
    for name in (f"{_PARAMETERS}/{path}" for path in paths):
        record = manifest.arrays[name]
        where = parameter_sharding(name, record.shape, mesh, rules) if mesh else jnp.zeros(()).sharding
        like[name] = jax.ShapeDtypeStruct(record.shape, jnp.dtype(record.dtype), sharding=where)
    leaves = by_path(read_arrays(directory, manifest, nest(like)))
    cast = {name: leaf if dtype is None else leaf.astype(dtype) for name, leaf in leaves.items()}
    return {path: cast[f"{_PARAMETERS}/{path}"] for path in paths}


def _parameter_groups(directory: Path, step: int) -> list[list[str]]:
    """The parameters in a checkpoint, by their paths below `params`; small ones are read together, a large one alone."""
    prefix, arrays = f"{_PARAMETERS}/", step_manifest(directory, step).arrays
    sizes = {path.removeprefix(prefix): math.prod(record.shape) * jnp.dtype(record.dtype).itemsize
             for path, record in arrays.items() if path.startswith(prefix)}  # fmt: skip
    if not sizes:
        raise InputError(f"checkpoint {directory / str(step)}: no {_PARAMETERS} in it, the state of a training expected")
    return groups(sizes, _TOGETHER)
