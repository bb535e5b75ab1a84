"""The weights of a run of `train.py`: its directory as a `Source`."""

import dataclasses
import functools
import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from llama_jax.config import LlamaConfig, config_from_dict
from llama_jax.errors import CorruptError, InputError
from llama_jax.weights.source import blamed_on

if TYPE_CHECKING:
    from llama_jax.weights.checkpoint import Restored
    from llama_jax.weights.manifest import Manifest

# A run directory as `train.py` lays it out.
RUN_CHECKPOINTS = "checkpoints"
RUN_TOKENIZER = "tokenizer.model"


@dataclasses.dataclass(frozen=True, eq=False)
class RunSource:
    """A run directory as a `Source`: the newest checkpoint that is whole.

    Attributes:
      directory: where the run is.
      config: the architecture that was trained.
      manifest: what the newest checkpoint says about itself; damage of its arrays shows when they are restored.
    """

    directory: pathlib.Path
    config: LlamaConfig
    manifest: "Manifest"

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "RunSource":
        """Reads what the newest checkpoint says about itself, and no array.

        Raises:
          InputError: if there is no checkpoint, or none of a model.
          CorruptError: if the manifests of all checkpoints are damaged.
        """
        from llama_jax.weights.checkpoint import list_steps, newest_manifest  # Orbax takes seconds to import

        checkpoints = pathlib.Path(directory) / RUN_CHECKPOINTS
        manifest = newest_manifest(checkpoints)
        if manifest is None and list_steps(checkpoints):
            raise CorruptError(f"{checkpoints}: all checkpoints are damaged; bring back a copy or start another run")
        if manifest is None:
            raise InputError(f"{checkpoints}: no checkpoint there, the checkpoints of a run expected")
        if not isinstance(manifest.metadata.get("model"), dict):
            raise InputError(
                f"{checkpoints}: step {manifest.step} does not say which model it is of; the run of train.py expected"
            )
        with blamed_on(checkpoints):
            return cls(pathlib.Path(directory), config_from_dict(manifest.metadata["model"]), manifest)

    @functools.cached_property
    def restored(self) -> "Restored":
        """The verified parameters, stacked, on the default device; restored at the first use.

        Raises:
          CorruptError: if all checkpoints are damaged.
        """
        from llama_jax.weights.checkpoint import restore_parameters

        return restore_parameters(self.directory / RUN_CHECKPOINTS)

    def read(self, name: str, layer: int | None) -> np.ndarray:
        """One tensor, as it was trained; see `Source.read`."""
        tensor = functools.reduce(lambda node, part: node[part], name.split("/"), self.restored.state)
        return np.asarray(tensor if layer is None else tensor[layer])
