"""The arrays of a checkpoint layer by layer, read and verified in slices: no more than one layer of one of them is in memory.

Checkpoints are written a layer a chunk (`layer_chunks`), so that a slice is all that a read takes from the files. In those of
older versions a chunk holds all layers; they are read all the same, with more memory.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from llama_jax.axes import PyTree
from llama_jax.errors import CorruptError
from llama_jax.weights.checkpoint import blamed_on_files
from llama_jax.weights.checkpoint_files import Restored, newest_whole, step_manifest
from llama_jax.weights.checksum import fold_part

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
        self._sums: dict[str, tuple[int, int, int]] = {}  # by path: the next layer, and the sums of those before it

    @property
    def paths(self) -> list[str]:
        """The parameters, by their paths below `params`."""
        return [path.removeprefix(_PREFIX) for path in self._manifest.arrays if path.startswith(_PREFIX)]

    def layers(self, path: str) -> list[int | None]:
        """The slices that a parameter is read in: its layers, if these lie in one array; else all of it at once."""
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
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{_PREFIX}{path}".replace("/", ".") + "/"}
        store = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, read=True, open=True).result()
        if tuple(store.shape) != record.shape or store.dtype.numpy_dtype.name != record.dtype:
            there = f"{store.dtype.name}{list(store.shape)}"
            raise CorruptError(f"checkpoint {self._where}: {_PREFIX}{path} is damaged: {there} in the files, "
                               f"{record.dtype}{list(record.shape)} saved")  # fmt: skip
        return store

    def _verify(self, path: str, layer: int | None, array: np.ndarray) -> None:
        """Adds up the sums of the slices; compares them with the manifest once all have come, in their order."""
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
            raise CorruptError(f"checkpoint {self._where}: {_PREFIX}{path} is damaged: checksum {found} read, {saved} saved")


def verified_parameters(directory: Path, read: Callable[[SlicedCheckpoint], PyTree]) -> Restored | None:
    """What is made of the parameters of the newest whole checkpoint; `None` where there is none.

    Args:
      directory: as for `Checkpoints.open`.
      read: reads all parameters of a checkpoint; damage that it meets begins anew with an older one.

    Raises:
      CorruptError: if all are damaged.
    """
    directory = directory.absolute()
    return newest_whole(directory, lambda step: read(SlicedCheckpoint(directory, step)))
