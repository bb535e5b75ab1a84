"""One call for every kind of model on disk: our own run, a Hugging Face directory, a GGUF file."""

import pathlib
from typing import Literal, NamedTuple

from jax.typing import DTypeLike

from llama_jax.axes import Parameters
from llama_jax.config import LlamaConfig, config_from_dict
from llama_jax.errors import InputError
from llama_jax.text.chat import ChatTemplate, template_from_directory, template_from_gguf
from llama_jax.text.gguf import tokenizer_from_gguf
from llama_jax.text.stops import declared_stop_ids, declared_stop_ids_from_gguf, stop_ids
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer
from llama_jax.weights.assemble import assemble
from llama_jax.weights.checkpoint import restore_parameters
from llama_jax.weights.forms import unstack
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.hugging_face import HuggingFaceSource

Form = Literal["stacked", "unrolled"]

# A run directory as `train.py` lays it out.
RUN_CHECKPOINTS = "checkpoints"
RUN_TOKENIZER = "tokenizer.model"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class Pretrained(NamedTuple):
    """A model with all that is needed to use it.

    Attributes:
      config: the architecture.
      params: the parameter tree.
      tokenizer: text to ids and back; `None` for a Hugging Face directory without tokenizer files.
      template: how the model wants a conversation written; `None` if its files say nothing.
      stop_ids: tokens that end a text.
      origin: one line that says what was loaded, damaged checkpoints that were passed over included; for people.
    """

    config: LlamaConfig
    params: Parameters
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    stop_ids: tuple[int, ...]
    origin: str


def load(path: str | pathlib.Path, dtype: DTypeLike = "float32", form: Form = "unrolled") -> Pretrained:
    """Loads a model from a run directory of `train.py`, a Hugging Face directory, or a GGUF file.

    Args:
      path: where it is.
      dtype: type of the parameters in memory.
      form: `unrolled` (fastest to decode with) or `stacked` (the form of training).

    Raises:
      InputError: for a path that holds none of these, and naming whatever is wrong inside.
      CorruptError: when every checkpoint of a run is damaged.
    """
    path = pathlib.Path(path)
    if path.is_file() and path.suffix == ".gguf":
        return _load_gguf(path, dtype, form)
    if (path / RUN_CHECKPOINTS).is_dir():
        return _load_run(path, dtype, form)
    if (path / "config.json").is_file():
        return _load_hugging_face(path, dtype, form)
    found = "nothing" if not path.exists() else "a directory without either" if path.is_dir() else "another file"
    raise InputError(f"{path}: {found} given; a run directory, a Hugging Face directory (config.json) or a .gguf file expected")


def _load_gguf(path: pathlib.Path, dtype: DTypeLike, form: Form) -> Pretrained:
    source = GgufSource.open(path)
    metadata = source.file.metadata
    tokenizer = tokenizer_from_gguf(metadata)
    stops = stop_ids(tokenizer, declared_stop_ids_from_gguf(metadata))
    params = assemble(source, form, dtype)
    return Pretrained(source.config, params, tokenizer, template_from_gguf(metadata), stops, f"GGUF {path.name}")


def _load_hugging_face(path: pathlib.Path, dtype: DTypeLike, form: Form) -> Pretrained:
    source = HuggingFaceSource.open(path)
    tokenizer = load_tokenizer(path) if any((path / name).is_file() for name in _TOKENIZER_FILES) else None
    declared = declared_stop_ids(path)
    stops = stop_ids(tokenizer, declared) if tokenizer else tuple(sorted(declared))
    params = assemble(source, form, dtype)
    return Pretrained(source.config, params, tokenizer, template_from_directory(path), stops, f"Hugging Face {path.name}")


def _load_run(path: pathlib.Path, dtype: DTypeLike, form: Form) -> Pretrained:
    restored = restore_parameters(path / RUN_CHECKPOINTS, dtype)
    config = config_from_dict(restored.metadata["model"])
    params = unstack(restored.state) if form == "unrolled" else restored.state
    tokenizer = load_tokenizer(path / RUN_TOKENIZER)
    warnings = f" ({'; '.join(restored.warnings)})" if restored.warnings else ""
    origin = f"run {path.name} at step {restored.step}{warnings}"
    return Pretrained(config, params, tokenizer, None, stop_ids(tokenizer), origin)
