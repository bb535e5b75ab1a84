"""What the readers of other people's weights share: one protocol, and one check of tensor names and shapes.

Both formats store a matrix as `[out, in]`, the transpose of the canonical tree's; only the embedding table is alike.
"""

import contextlib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Protocol, runtime_checkable

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
          The tensor without a layer axis, in the file's own floating type, or float32 where the file is quantised.
          It may be a view of the file: copy it before the source goes away.
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
    """Shapes of a parameter tree by path: as `flat_shapes`, or unrolled, `{"layers_0/attention/wq": (D, N*H), ...}`."""
    shapes = flat_shapes(config)
    if stacked:
        return shapes
    layered = [path for path in shapes if path.startswith("layers/")]
    unrolled = {of_layer(path, layer): shapes[path][1:] for layer in range(config.layers) for path in layered}
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
      InputError: counting the missing, unexpected and misshapen tensors and naming the first few of each.
    """
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    problems = [
        _listed("missing", (name for name in expected if name not in found)),
        _listed("unexpected", (name for name in found if name not in expected)),
        _listed("misshapen", (f"{name} {found[name]} where {expected[name]} is expected" for name in wrong)),
    ]
    if any(problems):
        raise InputError("tensors do not fit the architecture: " + "; ".join(filter(None, problems)))


def _listed(kind: str, names: Iterable[str], few: int = 4) -> str:
    names = list(names)
    rest = [f"and {len(names) - few} more"] if len(names) > few else []
    return f"{len(names)} {kind}: {', '.join([*map(shown, names[:few]), *rest])}" if names else ""
