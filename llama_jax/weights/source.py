"""What the readers of other people's weights share: one protocol, and one check of tensor names and
shapes.

Both formats store a matrix as `[out, in]`, the transpose of the canonical tree's; only the
embedding table is alike.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import numpy as np

from llama_jax.accounting import parameter_shapes
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError

Shape = tuple[int, ...]

# Text from files is shown cut: a hostile name may be megabytes long, or hold line breaks.
_CUT = reprlib.Repr()
_CUT.maxstring = 100


@runtime_checkable
class Source(Protocol):
    """A checkpoint of others, read one tensor at a time."""

    @property
    def config(self) -> LlamaConfig:
        """The architecture that the checkpoint declares."""

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor in the canonical orientation and rotary layout.

        Args:
          name: canonical path, such as `embedding` or `layers/attention/wq`.
          layer: which layer, from 0, for a path that starts with `layers/`; else `None`.

        Returns:
          The tensor without a layer axis, in the file's own floating type, or float32 where the
          file is quantised. It may be a view of the file: copy it before the source goes away.
        """


def shown(value: object) -> str:
    """A value from a file, fit for a one-line message: quoted, and cut where it is long."""
    return _CUT.repr(value)


@contextlib.contextmanager
def blamed_on(path: str | PathLike[str]) -> Iterator[None]:
    """Puts the path of a file in front of any `InputError` raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def flat_shapes(config: LlamaConfig) -> dict[str, Shape]:
    """Shapes of the canonical tree by path: `{"layers/attention/wq": (L, D, N*H), ...}`."""
    return dict(_leaves(parameter_shapes(config), ""))


def tree_shapes(config: LlamaConfig, stacked: bool) -> dict[str, Shape]:
    """Shapes of a parameter tree by path: as `flat_shapes`, or unrolled, `{"layers_0/attention/wq":
    (D, N*H), ...}`.
    """
    shapes = flat_shapes(config)
    if stacked:
        return shapes
    layered = [path for path in shapes if path.startswith("layers/")]
    unrolled = {
        of_layer(path, layer): shapes[path][1:]
        for layer in range(config.layers)
        for path in layered
    }
    return {path: shape for path, shape in shapes.items() if path not in layered} | unrolled


def of_layer(path: str, layer: int) -> str:
    """A path of the stacked form in the unrolled one."""
    return path.replace("layers", f"layers_{layer}", 1)


def _leaves(tree: dict, prefix: str) -> Iterator[tuple[str, Shape]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def file_shapes(config: LlamaConfig, names: Mapping[str, str]) -> dict[str, Shape]:
    """Names and shapes that a file of this architecture has to hold.

    Args:
      config: the architecture.
      names: canonical path to the file's name, with `{}` where the number of the layer stands.
    """
    shapes = {}
    for path, shape in flat_shapes(config).items():
        stacked = path.startswith("layers/")
        one = shape[1:] if stacked else shape
        for layer in range(config.layers) if stacked else (None,):
            shapes[names[path].format(layer)] = one if path == "embedding" else one[::-1]
    return shapes


def oriented(path: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor of a file turned to the canonical orientation (a view)."""
    return tensor if path == "embedding" else tensor.T


def require_tensors(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Refuses a file whose tensors are not exactly those of its architecture.

    Raises:
      InputError: counting the missing, unexpected and misshapen tensors and naming the first few of
        each.
    """
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    problems = [
        _listed("missing", (name for name in expected if name not in found)),
        _listed("unexpected", (name for name in found if name not in expected)),
        _listed(
            "misshapen",
            (f"{name} {found[name]} where {expected[name]} is expected" for name in wrong),
        ),
    ]
    if any(problems):
        raise InputError(
            "tensors do not fit the architecture: " + "; ".join(filter(None, problems))
        )


def _listed(kind: str, names: Iterable[str], few: int = 4) -> str:
    names = list(names)
    rest = [f"and {len(names) - few} more"] if len(names) > few else []
    return f"{len(names)} {kind}: {', '.join([*map(shown, names[:few]), *rest])}" if names else ""


# --- files ---
#
# Files that nobody vouches for, opened with care: mapped bytes, and descriptions in JSON.


_LARGEST_JSON = 16 << 20


def mapped(path: str | os.PathLike[str]) -> np.ndarray:
    """The bytes of a regular file, `[size]`, mapped read-only: nothing is read until it is looked
    at.

    Raises:
      InputError: for a file that is missing, unreadable, or not a regular one (a pipe would make
        the reader wait).
    """
    try:
        size = _regular(pathlib.Path(path)).stat().st_size
        # An empty file cannot be mapped; the parser refuses it.
        return np.asarray(np.memmap(path, np.uint8, "r")) if size else np.empty(0, np.uint8)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from None


def json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a small JSON file holds.

    Raises:
      InputError: for a file that is missing, unreadable or larger than a description is, for other
        text than JSON, and for another kind of JSON value.
    """
    try:
        if _regular(pathlib.Path(path)).stat().st_size > _LARGEST_JSON:
            raise InputError(f"larger than {_LARGEST_JSON} bytes; a description of a model is not")
        values = json.loads(pathlib.Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("not valid JSON; fetch the file again") from None
    if not isinstance(values, dict):
        raise InputError("does not hold a JSON object")
    return values


def _regular(path: pathlib.Path) -> pathlib.Path:
    if path.exists() and not path.is_file():
        raise InputError("cannot be read: not a regular file")
    return path


# --- merged ---
#
# A source with adapters merged into it. Like all that opens a model, it does without JAX.


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
    """A source with adapters merged into it, one tensor at a time: added in float32, in the type
    that the tensor had.

    Attributes:
      base: the model.
      adapters: for it, stacked or unrolled.
    """

    base: Source
    adapters: Factors

    @functools.cached_property
    def config(self) -> LlamaConfig:
        """The architecture of the base, with the vocabulary and the head that the adapters give it.

        A tied head stays what it was where only the embedding is adapted or replaced, as in PEFT:
          it is then of its own.
        """
        base, changed = (
            self.base.config,
            {path for path, _ in self.adapters.replaced} | self.adapters.tree.keys(),
        )
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
        tensor = self._with_new_tokens(name, tensor)
        factors = self._factors(name, layer)
        if factors is None:
            return tensor
        a, b = factors
        return (tensor.astype(np.float32) + a @ b * np.float32(self.adapters.scale)).astype(
            tensor.dtype
        )

    def _with_new_tokens(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Embedding or head with the trained change of its last entries; see `init_adapters`."""
        part = {"embedding": "inputs", "head": "outputs"}.get(name)
        change = self.adapters.tree.get("new_tokens", {}).get(part)
        if change is None:
            return tensor
        changed = np.array(tensor, np.float32)
        last = changed[-len(change) :] if name == "embedding" else changed[:, -change.shape[1] :]
        last += np.asarray(change, np.float32)
        return changed.astype(tensor.dtype)

    def _factors(self, name: str, layer: int | None) -> list[np.ndarray] | None:
        """The two factors of a matrix, float32."""
        node: Any = self.adapters.tree
        first, *rest = name.split("/")
        stacked = layer is not None and first in node
        for key in (first if stacked or layer is None else f"{first}_{layer}", *rest):
            node = node.get(key, {})
        if "a" not in node:
            return None
        return [
            np.asarray(node[factor][layer] if stacked else node[factor], np.float32)
            for factor in ("a", "b")
        ]


# --- values ---
#
# Numbers out of other people's configuration: present, of the right kind, or refused by the name of
# their key.


_LARGEST = 1 << 63  # JSON has no bound of its own


def whole(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number; a null or absent one is the default. Its range is the business of
    `LlamaConfig`.

    Raises:
      InputError: naming the key, for another kind of value or a missing one without a default.
    """
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
        raise InputError(f"{key} is {shown(value)}; a whole number expected")
    return value


def real(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A real number; as `whole` otherwise."""
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{key} is {shown(value)}; a number expected")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{key} is {shown(value)}; a smaller number expected") from None


def flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    """True or false; as `whole` otherwise."""
    value = _given(values, key, default)
    if not isinstance(value, bool):
        raise InputError(f"{key} is {shown(value)}; true or false expected")
    return value


def quotient(values: Mapping[str, Any], dim_key: str, heads_key: str) -> int:
    """The width of a head that nothing else states: the width of the model shared out evenly.

    Raises:
      InputError: naming both keys, where it does not come out even.
    """
    dim, heads = whole(values, dim_key), whole(values, heads_key)
    if heads < 1 or dim % heads:
        raise InputError(f"{dim_key} {shown(dim)} is not a multiple of {heads_key} {shown(heads)}")
    return dim // heads


def _given(values: Mapping[str, Any], key: str, default: Any) -> Any:
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise InputError(f"{key} is missing")
    return value
