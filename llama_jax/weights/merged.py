"""A source with adapters merged into it. Like all that opens a model, it does without JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.weights.source import Source

CONFIG = "adapter_config.json"  # what makes a directory one of adapters


@runtime_checkable
class Factors(Protocol):
    """Adapters as far as merging them goes; see `llama_jax.weights.peft.Adapters`."""

    @property
    def tree(self) -> Mapping[str, Any]:
        """`{"a", "b"}` at the names that are adapted."""

    @property
    def scale(self) -> float:
        """What `a b` is multiplied by."""


@dataclasses.dataclass(frozen=True, eq=False)
class MergedSource:
    """A source with adapters merged into it, one tensor at a time: added in float32, in the type that the tensor had.

    Attributes:
      base: the model.
      adapters: for it, stacked or unrolled.
    """

    base: Source
    adapters: Factors

    @property
    def config(self) -> LlamaConfig:
        """The architecture of the base."""
        return self.base.config

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor; see `Source.read`."""
        tensor = self.base.read(name, layer)
        factors = None if layer is None else self._factors(name, layer)
        if factors is None:
            return tensor
        a, b = factors
        return (tensor.astype(np.float32) + a @ b * np.float32(self.adapters.scale)).astype(tensor.dtype)

    def _factors(self, name: str, layer: int) -> list[np.ndarray] | None:
        """The two factors of a matrix of a layer, float32."""
        node: Any = self.adapters.tree
        first, *rest = name.split("/")
        stacked = first in node
        for key in (first if stacked else f"{first}_{layer}", *rest):
            node = node.get(key, {})
        if "a" not in node:
            return None
        return [np.asarray(node[factor][layer] if stacked else node[factor], np.float32) for factor in ("a", "b")]
