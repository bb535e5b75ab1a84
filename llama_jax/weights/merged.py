"""A source with adapters merged into it. Like all that opens a model, it does without JAX."""

import dataclasses
import functools
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

    @property
    def replaced(self) -> Mapping[tuple[str, int | None], np.ndarray]:
        """Whole tensors by canonical path and layer."""

    @property
    def tied(self) -> bool:
        """Whether a tied head follows the embedding."""


@dataclasses.dataclass(frozen=True, eq=False)
class MergedSource:
    """A source with adapters merged into it, one tensor at a time: added in float32, in the type that the tensor had.

    Attributes:
      base: the model.
      adapters: for it, stacked or unrolled.
    """

    base: Source
    adapters: Factors

    @functools.cached_property
    def config(self) -> LlamaConfig:
        """The architecture of the base, with the vocabulary and the head that the adapters give it.

        A tied head stays what it was where only the embedding is adapted or replaced, as in PEFT: it is then of its own.
        """
        base, changed = self.base.config, {path for path, _ in self.adapters.replaced} | self.adapters.tree.keys()
        embedding = self.adapters.replaced.get(("embedding", None))
        untied = not self.adapters.tied and not changed.isdisjoint(("embedding", "head"))
        size = base.vocab_size if embedding is None else len(embedding)
        return dataclasses.replace(base, vocab_size=size, tied_head=base.tied_head and not untied)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor; see `Source.read`."""
        tensor = self.adapters.replaced.get((name, layer))
        if tensor is None and name == "head" and self.base.config.tied_head:
            tensor = self.base.read("embedding", None).T
        tensor = self.base.read(name, layer) if tensor is None else tensor
        factors = self._factors(name, layer)
        if factors is None:
            return tensor
        a, b = factors
        return (tensor.astype(np.float32) + a @ b * np.float32(self.adapters.scale)).astype(tensor.dtype)

    def _factors(self, name: str, layer: int | None) -> list[np.ndarray] | None:
        """The two factors of a matrix, float32."""
        node: Any = self.adapters.tree
        first, *rest = name.split("/")
        stacked = layer is not None and first in node
        for key in (first if stacked or layer is None else f"{first}_{layer}", *rest):
            node = node.get(key, {})
        if "a" not in node:
            return None
        return [np.asarray(node[factor][layer] if stacked else node[factor], np.float32) for factor in ("a", "b")]
