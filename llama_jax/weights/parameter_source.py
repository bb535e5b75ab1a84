"""Sources that are no file: parameters in memory, and a source that is watched while it is read."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from llama_jax.axes import Parameters
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.weights.source import Shape, Source, blamed_on, flat_shapes, require_tensors


class ParameterSource:
    """A parameter tree in memory as a `Source`, whichever its form.

    Attributes:
      config: the architecture of the parameters.

    Raises:
      InputError: if the tree is not one of this architecture, counting and naming what is missing, too much or misshapen.
    """

    def __init__(self, config: LlamaConfig, params: Parameters) -> None:
        self.config = config
        self._stacked = "layers" in params
        self._arrays: dict[str, Any] = flatten_dict(params, sep="/")
        with blamed_on("parameters"):
            strange = [name for name, leaf in self._arrays.items() if not isinstance(leaf, jax.Array | np.ndarray)]
            if strange:
                raise InputError(f"{strange[0]} is a {type(self._arrays[strange[0]]).__name__}; an array expected")
            require_tensors(self._expected(), {name: leaf.shape for name, leaf in self._arrays.items()})

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor on the host; see `Source.read`. Of a stacked tree, only that layer is copied from the device."""
        if layer is None:
            return np.asarray(self._arrays[name])
        return np.asarray(self._arrays[name][layer] if self._stacked else self._arrays[_of_layer(name, layer)])

    def _expected(self) -> dict[str, Shape]:
        shapes = flat_shapes(self.config)
        if self._stacked:
            return shapes
        layered = [name for name in shapes if name.startswith("layers/")]
        unrolled = {_of_layer(name, i): shapes[name][1:] for i in range(self.config.layers) for name in layered}
        return {name: shape for name, shape in shapes.items() if name not in layered} | unrolled


def _of_layer(name: str, layer: int) -> str:
    """The path of the stacked form in the unrolled one."""
    return name.replace("layers", f"layers_{layer}", 1)


@dataclasses.dataclass(frozen=True)
class WatchedSource:
    """A source that tells how far the reading is.

    Attributes:
      source: what is read.
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
