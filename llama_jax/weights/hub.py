"""Models by their name on the Hugging Face Hub, fetched by its own client into its own cache (extra `hf`).

What the client is told by the environment holds here too: where the cache is, whether to stay offline, who is asking.
"""

import pathlib
import re

from llama_jax.errors import InputError
from llama_jax.weights.source import shown

_NAME = re.compile(r"([a-zA-Z0-9][\w.-]*/[a-zA-Z0-9][\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)

# What a model is made of; nothing else of a repository is fetched.
_FILES = ("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
          "model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
          "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # fmt: skip
_PICKLES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json")  # where there is no safetensors

# By the name of the client's error.
_REASONS = {
    "GatedRepoError": "its licence has to be accepted there first, and you logged in with: hf auth login",
    "LocalEntryNotFoundError": "it is not in the cache, and the Hub cannot be reached or offline mode is set",
    "OfflineModeIsEnabled": "it is not in the cache, and offline mode is set",
    "RepositoryNotFoundError": "no such model, or one for which you have to be logged in",
    "RevisionNotFoundError": "no such revision of it",
}


def names_model(path: pathlib.Path) -> bool:
    """Whether a path that leads nowhere may be a name such as `meta-llama/Llama-3.2-1B`, with `@revision` or without.

    A path into a folder that is there is a path: a slip of the pen in it asks nobody on the network.
    """
    return _NAME.fullmatch(path.as_posix()) is not None and not path.exists() and not path.parent.exists()


def fetch(path: pathlib.Path) -> pathlib.Path:
    """The directory of a model by its name, from the client's cache or, where that lacks a file, from the Hub.

    Raises:
      InputError: if the client is not installed, or cannot get the model: no such name, no network, no permission.
    """
    match = _NAME.fullmatch(path.as_posix())
    if match is None:
        raise InputError(f"{path}: a name such as meta-llama/Llama-3.2-1B or one with @revision expected")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        advice = "to fetch a model of that name from the Hugging Face Hub: pip install 'llama-jax[hf]'"
        raise InputError(f"{path}: nothing there; {advice}") from None
    try:
        found = pathlib.Path(snapshot_download(match[1], revision=match[2], allow_patterns=list(_FILES)))
        if not any(found.glob("model*.safetensors")):
            snapshot_download(match[1], revision=match[2], allow_patterns=[*_FILES, *_PICKLES])
        return found
    except Exception as error:  # the client's own, those of its HTTP library, those of the file system
        reason = _REASONS.get(type(error).__name__, f"{type(error).__name__}: {shown(str(error))}")
        raise InputError(
            f"{path}: nothing there, and not to be had from the Hugging Face Hub by that name ({reason})"
        ) from None
