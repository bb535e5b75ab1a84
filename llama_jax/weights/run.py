"""The weights of a run of `train.py`: its directory as a `Source`."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.config import LlamaConfig, config_from_dict
from llama_jax.errors import CorruptError, InputError
from llama_jax.weights.source import Shape, blamed_on, of_layer, require_tensors, shown, tree_shapes

if TYPE_CHECKING:
    from llama_jax.weights.checkpoint import Restored
    from llama_jax.weights.integrity import Manifest
    from llama_jax.weights.restore import SlicedCheckpoint

# A run directory as `train.py` lays it out.
RUN_CHECKPOINTS = "checkpoints"
RUN_TOKENIZER = "tokenizer.model"

_PREFIX = "params/"  # of the paths of parameters in a checkpoint
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def origin_of(directory: pathlib.Path, restored: "Restored") -> str:
    """One line that says which checkpoint of a run it is, with the damaged ones that were passed
    over for it.
    """
    warnings = f" ({'; '.join(restored.warnings)})" if restored.warnings else ""
    return f"run {directory.absolute().name} at step {restored.step}{warnings}"


def run_manifest(directory: pathlib.Path) -> "Manifest":
    """What the newest checkpoint of a run says about itself; no array is read.

    Raises:
      InputError: if there is no checkpoint.
      CorruptError: if the manifests of all checkpoints are damaged.
    """
    from llama_jax.weights.checkpoint import list_steps, newest_manifest  # which import JAX

    checkpoints = directory / RUN_CHECKPOINTS
    manifest = newest_manifest(checkpoints)
    if manifest is not None:
        return manifest
    if list_steps(checkpoints):
        raise CorruptError(
            f"{checkpoints}: all checkpoints are damaged; bring back a copy or start another run"
        )
    raise InputError(f"{checkpoints}: no checkpoint there, the checkpoints of a run expected")


def run_config(directory: pathlib.Path, manifest: "Manifest") -> LlamaConfig:
    """The architecture of a run's model.

    Raises:
      InputError: if the checkpoint does not say.
    """
    checkpoints = directory / RUN_CHECKPOINTS
    if not isinstance(manifest.metadata.get("model"), dict):
        raise InputError(
            f"{checkpoints}: step {manifest.step} does not say which model it is of; the "
            "run of train.py expected"
        )
    with blamed_on(f"{checkpoints}: step {manifest.step}"):
        return config_from_dict(manifest.metadata["model"])


def has_adapters(manifest: "Manifest") -> bool:
    """Whether a run trained adapters alone: every whole model has an embedding."""
    return not any(path.startswith("params/embedding") for path in manifest.arrays)


def check_parameters(manifest: "Manifest", expected: Mapping[str, Shape]) -> None:
    """Refuses a checkpoint whose parameters are not those of its architecture.

    Args:
      manifest: of the checkpoint.
      expected: shapes by path, such as `layers/attention/wq`.

    Raises:
      InputError: counting and naming what is missing, too much, misshapen, or of no floating type.
    """
    found = {
        path.removeprefix(_PREFIX): record
        for path, record in manifest.arrays.items()
        if path.startswith(_PREFIX)
    }
    require_tensors(expected, {path: record.shape for path, record in found.items()})
    strange = [path for path, record in found.items() if record.dtype not in _DTYPES]
    if strange:
        raise InputError(
            f"{shown(strange[0])} has type {found[strange[0]].dtype}; supported are "
            f"{', '.join(_DTYPES)}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class RunSource:
    """A run directory as a `Source`: the newest checkpoint that is whole.

    Attributes:
      directory: where the run is.
      config: the architecture that was trained.
      manifest: of the newest checkpoint; damage of its arrays shows when they
        are restored.
    """

    directory: pathlib.Path
    config: LlamaConfig
    manifest: "Manifest"

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "RunSource":
        """Reads the manifest of the newest checkpoint, and no array.

        Raises:
          InputError: if there is no checkpoint, or none of a whole model.
          CorruptError: if the manifests of all checkpoints are damaged.
        """
        directory = pathlib.Path(directory)
        manifest = run_manifest(directory)
        if has_adapters(manifest):
            raise InputError(f"{directory}: a run of adapters given, of a whole model expected")
        source = cls(directory, run_config(directory, manifest), manifest)
        with blamed_on(f"{directory / RUN_CHECKPOINTS}: step {manifest.step}"):
            check_parameters(manifest, tree_shapes(source.config, source.stacked))
        return source

    @property
    def stacked(self) -> bool:
        """Whether the layers of a parameter lie in one array: whether the run scanned them."""
        return any(path.startswith("params/layers/") for path in self.manifest.arrays)

    @functools.cached_property
    def verified(self) -> "Restored":
        """The newest checkpoint whose parameters are whole, without these; found at the first use,
        by reading all of them.

        Raises:
          CorruptError: if all checkpoints are damaged.
        """
        from llama_jax.weights.restore import verified_parameters  # Orbax takes seconds to import

        restored = verified_parameters(
            self.directory / RUN_CHECKPOINTS, lambda checkpoint: checkpoint.verify()
        )
        if restored is None:
            raise InputError(
                f"{self.directory / RUN_CHECKPOINTS}: no checkpoint there, the "
                "checkpoints of a run expected"
            )
        return restored

    @functools.cached_property
    def _slices(self) -> "SlicedCheckpoint":
        from llama_jax.weights.restore import SlicedCheckpoint

        return SlicedCheckpoint(self.directory / RUN_CHECKPOINTS, self.verified.step)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor of one layer, as it was trained; see `Source.read`."""
        return RunSlices(self, self._slices).read(name, layer)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a parameter, by the manifest; nothing is read."""
        return np.dtype(self.manifest.arrays[f"params/{self.path(name, 0)}"].dtype)

    def path(self, name: str, layer: int | None) -> str:
        """Where a checkpoint has a parameter: with those of all layers, or in a run with unrolled
        layers, in its own.
        """
        return name if layer is None or self.stacked else of_layer(name, layer)


@dataclasses.dataclass(frozen=True, eq=False)
class RunSlices:
    """One checkpoint of a run as a `Source`, verified as it is read: each parameter from its first
    layer to its last.

    Attributes:
      run: of which it is.
      checkpoint: its arrays.
    """

    run: RunSource
    checkpoint: "SlicedCheckpoint"

    @property
    def config(self) -> LlamaConfig:
        """The architecture that was trained."""
        return self.run.config

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor; see `Source.read`.

        Raises:
          CorruptError: if the content of a parameter is not what was saved; known when its last
            layer is read.
        """
        return self.checkpoint.read(self.run.path(name, layer), layer if self.run.stacked else None)
