"""The parameters of a run's newest checkpoint, one array after the other; the rest of its state is
not read.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from llama_jax.axes import Array, PyTree
from llama_jax.errors import CorruptError, InputError
from llama_jax.parallel.sharding import TRAINING, Rules
from llama_jax.weights.assemble import parameter_sharding
from llama_jax.weights.checkpoint import (
    Restored,
    blamed_on_files,
    check_arrays,
    list_steps,
    newest_whole,
    read_arrays,
    step_manifest,
)
from llama_jax.weights.integrity import by_path, fold_part, groups, nest

_PARAMETERS = "params"  # the subtree of a state that inference needs

# What becomes of a parameter that has been read: from its path and the array to what takes its
# place in the tree, by path.
Place = Callable[[str, Array], Mapping[str, PyTree]]

_TOGETHER = 16 << 20  # bytes of small arrays that are read at a time


def _as_it_is(path: str, leaf: Array) -> dict[str, Array]:
    return {path: leaf}


def restore_parameters(
    directory: Path,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Rules = TRAINING,
    place: Place = _as_it_is,
) -> Restored:
    """The verified parameters of the newest whole checkpoint; the optimizer's state is not read.

    Nothing in the directory is changed, so a run may be writing to it. One array after the other,
    or several small ones, are read, verified, cast and placed: beside the result, no more than the
    largest of them is in memory. Damage that shows late begins anew with an older one.

    Args:
      directory: as for `Checkpoints.open`.
      dtype: to cast the parameters to; as they were saved when `None`.
      mesh: the devices to lay them out over, each shard read where it lives; the default device
        when `None`.
      rules: axis name -> mesh axes, for `mesh`.
      place: called with the path (such as `layers/attention/wq`) and the array of each; by default
        it takes its place as it is.

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
    directory: Path,
    step: int,
    paths: Sequence[str],
    dtype: jax.typing.DTypeLike | None,
    mesh: Mesh | None,
    rules: Rules,
) -> dict[str, Array]:
    """Verified parameters of one checkpoint by their paths."""
    manifest = step_manifest(directory, step)
    like = {}
    for name in (f"{_PARAMETERS}/{path}" for path in paths):
        record = manifest.arrays[name]
        where = (
            parameter_sharding(name, record.shape, mesh, rules) if mesh else jnp.zeros(()).sharding
        )
        like[name] = jax.ShapeDtypeStruct(record.shape, jnp.dtype(record.dtype), sharding=where)
    leaves = by_path(read_arrays(directory, manifest, nest(like)))
    cast = {name: leaf if dtype is None else leaf.astype(dtype) for name, leaf in leaves.items()}
    return {path: cast[f"{_PARAMETERS}/{path}"] for path in paths}


def _parameter_groups(directory: Path, step: int) -> list[list[str]]:
    """The parameters in a checkpoint, by their paths below `params`; small ones are read together,
    a large one alone.
    """
    prefix, arrays = f"{_PARAMETERS}/", step_manifest(directory, step).arrays
    sizes = {
        path.removeprefix(prefix): math.prod(record.shape) * jnp.dtype(record.dtype).itemsize
        for path, record in arrays.items()
        if path.startswith(prefix)
    }
    if not sizes:
        raise InputError(
            f"checkpoint {directory / str(step)}: no {_PARAMETERS} in it, the state of a "
            "training expected"
        )
    return groups(sizes, _TOGETHER)


# --- slices ---
#
# The arrays of a checkpoint layer by layer, read and verified in slices: no more than one layer of
# one of them is in memory.
#
# Checkpoints are written a layer a chunk (`layer_chunks`), so that a slice is all that a read takes
# from the files. In those of older versions a chunk holds all layers; they are read all the same,
# with more memory.


_PREFIX = "params/"
_MASK = 0xFFFFFFFF


class SlicedCheckpoint:
    """The parameters of one checkpoint, read in slices.

    Raises:
      CorruptError: if the manifest is damaged.
    """

    def __init__(self, directory: Path, step: int) -> None:
        self._where = directory.absolute() / str(step)
        self._manifest = step_manifest(directory, step)
        self._open = functools.lru_cache(maxsize=1)(self._opened)
        self._sums: dict[
            str, tuple[int, int, int]
        ] = {}  # by path: the next layer, and the sums of those before it

    @property
    def paths(self) -> list[str]:
        """The parameters, by their paths below `params`."""
        return [
            path.removeprefix(_PREFIX) for path in self._manifest.arrays if path.startswith(_PREFIX)
        ]

    def layers(self, path: str) -> list[int | None]:
        """The slices that a parameter is read in: its layers, if these lie in one array; else all
        of it at once.
        """
        shape = self._manifest.arrays[_PREFIX + path].shape
        return list(range(shape[0])) if path.startswith("layers/") else [None]

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """A layer of a stacked parameter, or all of another one.

        What is read from the first layer to the last is verified with the last.

        Raises:
          CorruptError: if the files are damaged, or the content is not what was saved.
        """
        with blamed_on_files(self._where):
            store = self._open(path)
            array = np.asarray((store if layer is None else store[layer]).read().result())
        self._verify(path, layer, array)
        return array

    def verify(self) -> None:
        """Reads all parameters, and keeps none.

        Raises:
          CorruptError: as `read`.
        """
        for path in self.paths:
            for layer in self.layers(path):
                self.read(path, layer)

    def _opened(self, path: str) -> Any:
        """The array in the files; its shape and type are compared with the manifest."""
        record = self._manifest.arrays.get(_PREFIX + path)
        if record is None:
            raise CorruptError(f"checkpoint {self._where}: {_PREFIX}{path} is not in it")
        base = f"file://{self._where / 'state'}/"
        kvstore = {
            "driver": "ocdbt",
            "base": base,
            "path": f"{_PREFIX}{path}".replace("/", ".") + "/",
        }
        store = tensorstore.open(
            {"driver": "zarr", "kvstore": kvstore}, read=True, open=True
        ).result()
        if tuple(store.shape) != record.shape or store.dtype.numpy_dtype.name != record.dtype:
            there = f"{store.dtype.name}{list(store.shape)}"
            raise CorruptError(
                f"checkpoint {self._where}: {_PREFIX}{path} is damaged: {there} in the files, "
                f"{record.dtype}{list(record.shape)} saved"
            )
        return store

    def _verify(self, path: str, layer: int | None, array: np.ndarray) -> None:
        """Adds up the sums of the slices; compares them with the manifest once all have come, in
        their order.
        """
        at = layer or 0
        following, first, second = self._sums.pop(path, (0, 0, 0)) if at else (0, 0, 0)
        if following != at:
            return
        start = at * array.size * (2 if array.dtype.itemsize == 8 else 1)
        more = jax.device_get(fold_part(jnp.asarray(array), jnp.uint32(start & _MASK)))
        first, second = (first + int(more[0])) & _MASK, (second + int(more[1])) & _MASK
        if at + 1 < len(self.layers(path)):
            self._sums[path] = (at + 1, first, second)
            return
        found, saved = f"{first:08x}{second:08x}", self._manifest.arrays[_PREFIX + path].checksum
        if found != saved:
            raise CorruptError(
                f"checkpoint {self._where}: {_PREFIX}{path} is damaged: checksum {found} "
                f"read, {saved} saved"
            )


def verified_parameters(
    directory: Path, read: Callable[[SlicedCheckpoint], PyTree]
) -> Restored | None:
    """What is made of the parameters of the newest whole checkpoint; `None` where there is none.

    Args:
      directory: as for `Checkpoints.open`.
      read: reads all parameters of a checkpoint; damage that it meets begins anew with an older
        one.

    Raises:
      CorruptError: if all are damaged.
    """
    directory = directory.absolute()
    return newest_whole(directory, lambda step: read(SlicedCheckpoint(directory, step)))


# --- checkpoint check ---
#
# What lies in the directory of a run's checkpoints, whole or not, and whether it is what was saved;
# nothing is changed.


_CHECKED_TOGETHER = (
    64 << 20
)  # bytes of arrays that are read at a time: a state need not fit into memory to be verified

Condition = Literal["committed", "ok", "damaged", "set aside", "not committed"]


class CheckpointState(NamedTuple):
    """One entry of a directory of checkpoints.

    Attributes:
      name: of the entry, such as `40` or `40.corrupt`.
      step: optimizer updates that it holds, or would.
      nbytes: of all its files.
      time: of its newest file, seconds since 1970.
      condition: `committed`: whole by its manifest; `ok`: all arrays were read and are what was
        saved; `damaged`: they are not; `set aside`: found damaged by a run that went on from an
        older one; `not committed`: left by an interrupted save, or still being written.
      reason: the damage, if any.
    """

    name: str
    step: int
    nbytes: int
    time: float
    condition: Condition
    reason: str = ""


def list_checkpoints(directory: Path) -> list[CheckpointState]:
    """Everything in a directory of checkpoints, by step; manifests are read, arrays are not."""
    steps = {str(step) for step in list_steps(directory)}
    return sorted(
        (_describe(entry, entry.name in steps) for entry in _entries(directory)),
        key=lambda one: (one.step, one.name),
    )


def verify_checkpoints(directory: Path, step: int | None = None) -> Iterator[CheckpointState]:
    """Reads all arrays of the checkpoints of a directory, oldest first, and compares them with
    their checksums.

    Args:
      directory: of the checkpoints.
      step: of a single one.

    Raises:
      InputError: if there is no checkpoint, or not this one.
    """
    steps = list_steps(directory)
    if not steps:
        raise InputError(f"{directory}: no checkpoint there, the checkpoints of a run expected")
    if step is not None and step not in steps:
        raise InputError(f"--step: {step} given, one of {steps} expected, those in {directory}")
    return _verified(directory, steps if step is None else [step])


def _verified(directory: Path, steps: Iterable[int]) -> Iterator[CheckpointState]:
    for number in steps:
        with contextlib.suppress(FileNotFoundError):
            found = _describe(directory / str(number), True)
            if found.condition == "committed":
                reason = _damage(directory, number)
                (
                    directory / str(number)
                ).stat()  # one that a run has deleted in the meantime is not damaged
                found = found._replace(condition="damaged" if reason else "ok", reason=reason)
            yield found


def _entries(directory: Path) -> Iterator[Path]:
    """Directories whose names begin with a step."""
    for entry in directory.iterdir() if directory.is_dir() else []:
        if entry.is_dir() and re.fullmatch(r"\d+(\..+)?", entry.name):
            yield entry


def _describe(entry: Path, committed: bool) -> CheckpointState:
    step, _, more = entry.name.partition(".")
    stats = [path.stat() for path in entry.rglob("*") if path.is_file()]
    newest = max((stat.st_mtime for stat in stats), default=entry.stat().st_mtime)
    found = CheckpointState(
        entry.name, int(step), sum(stat.st_size for stat in stats), newest, "not committed"
    )
    if more.startswith("corrupt"):
        return found._replace(condition="set aside")
    if not committed:
        return found
    try:
        step_manifest(entry.parent, int(step))
    except CorruptError as error:
        return found._replace(condition="damaged", reason=str(error))
    return found._replace(condition="committed")


def _damage(directory: Path, step: int) -> str:
    """What is wrong with the arrays of a checkpoint; empty if nothing is."""
    try:
        check_arrays(directory, step, _CHECKED_TOGETHER)
    except CorruptError as error:
        return str(error)
    return ""
