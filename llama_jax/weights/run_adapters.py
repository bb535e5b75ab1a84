"""The adapters that a run trained."""

import pathlib

import jax

from llama_jax.errors import InputError
from llama_jax.weights.checkpoint_files import Restored
from llama_jax.weights.peft import Adapters, require_fit
from llama_jax.weights.restore import restore_parameters
from llama_jax.weights.run import RUN_CHECKPOINTS, has_adapters, run_config, run_manifest
from llama_jax.weights.source import blamed_on


def restore_adapters(directory: pathlib.Path) -> tuple[Adapters, Restored]:
    """The adapters of a run's newest checkpoint that is whole, and that checkpoint.

    Args:
      directory: of the run.

    Raises:
      InputError: for a run without checkpoints, and one that trained a whole model.
      CorruptError: if all checkpoints are damaged.
    """
    manifest = run_manifest(directory)
    if not has_adapters(manifest):
        raise InputError(f"{directory}: a run without adapters given; convert writes its model")
    restored = restore_parameters(directory / RUN_CHECKPOINTS)
    with blamed_on(f"{directory / RUN_CHECKPOINTS}: step {restored.step}"):
        require_fit(restored.state, run_config(directory, manifest))
    settings, made_from = restored.metadata.get("adapter"), restored.metadata.get("made_from")
    if not isinstance(settings, dict) or not isinstance(made_from, dict):
        raise InputError(f"{directory}: step {restored.step} does not say of which model and how its adapters are")
    return Adapters(jax.device_get(restored.state), settings["alpha"] / settings["rank"], made_from["path"]), restored
