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
from llama_jax.weights.source import Source, blamed_on, of_layer, require_tensors, tree_shapes


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
            require_tensors(tree_shapes(config, self._stacked), {name: leaf.shape for name, leaf in self._arrays.items()})

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor on the host; see `Source.read`. Of a stacked tree, only that layer is copied from the device."""
        if layer is None:
            return np.asarray(self._arrays[name])
        return np.asarray(self._arrays[name][layer] if self._stacked else self._arrays[of_layer(name, layer)])


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
