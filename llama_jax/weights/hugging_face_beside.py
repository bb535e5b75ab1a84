"""What lies beside the weights in a directory of Hugging Face's: the tokenizer's files, special tokens, the chat template."""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.text.chat import ChatTemplate, template_from_directory
from llama_jax.text.export import hugging_face_files
from llama_jax.text.files import read_json
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.weights.gguf import GgufSource
from llama_jax.weights.hugging_face_describe import TokenIds
from llama_jax.weights.hugging_face_files import inside
from llama_jax.weights.open import Opened
from llama_jax.weights.source import Source, blamed_on, shown

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja",
)  # fmt: skip
_LARGEST_TOKENIZER_FILE = 128 << 20
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "<PAD>", "[PAD]")  # as `text.export` writes for the tokenizer


class Beside(NamedTuple):
    """All that is written about a model but its weights and its architecture.

    Attributes:
      tokens: its special tokens.
      files: of the tokenizer and the chat template, by name.
      generation: what its earlier `generation_config.json` said.
      origin: one line that says what it was made from.
      chat: whether it has a chat template.
    """

    tokens: TokenIds
    files: Mapping[str, bytes]
    generation: Mapping[str, Any]
    origin: str
    chat: bool


def files_beside(opened: Opened) -> Beside:
    """What is to lie beside the weights of a model on disk; files of Hugging Face's are taken as they are.

    Raises:
      InputError: for damaged files, links out of the directory, and a tokenizer that transformers could not read.
    """
    generation: Mapping[str, Any] = {}
    if opened.format == "hugging_face":
        generation = read_json(opened.path / "generation_config.json")
        declared = {**read_json(opened.path / "config.json"), **generation}
        files = _copied(opened.beside or opened.path)
        if opened.template is not None and opened.template != template_from_directory(opened.beside or opened.path):
            files["chat_template.jinja"] = opened.template.source.encode()  # it lies beside adapters
    else:
        declared = _declared(opened.source)
        files = _written(opened.tokenizer, opened.template)
    tokens = _token_ids(opened.source.config, opened.tokenizer, opened.stop_ids, declared)
    return Beside(tokens, files, generation, opened.origin, opened.template is not None)


def files_of(
    config: LlamaConfig, tokenizer: Tokenizer | None, template: ChatTemplate | None, stop_ids: tuple[int, ...]
) -> Beside:
    """What is to lie beside the weights of a model in memory.

    Raises:
      InputError: for a tokenizer that transformers could not read, and stops outside the vocabulary.
    """
    size = tokenizer.vocab_size if tokenizer else config.vocab_size
    wrong = next((token for token in stop_ids if not 0 <= token < size), None)
    if wrong is not None:
        raise InputError(f"stop_ids: {shown(wrong)} given, ids of the vocabulary, 0 to {size - 1}, expected")
    tokens = _token_ids(config, tokenizer, tuple(sorted(set(stop_ids))), {})
    return Beside(tokens, _written(tokenizer, template), {}, "parameters in memory", template is not None)


def _declared(source: Source) -> dict[str, Any]:
    """What a GGUF file says about padding, in the words of Hugging Face."""
    metadata = source.file.metadata if isinstance(source, GgufSource) else {}
    return {"pad_token_id": metadata.get("tokenizer.ggml.padding_token_id")}


def _token_ids(
    config: LlamaConfig, tokenizer: Tokenizer | None, stops: tuple[int, ...], declared: Mapping[str, Any]
) -> TokenIds:
    """Special tokens; what the tokenizer does not know is taken from what the model's files declare."""
    begin = tokenizer.begin_id if tokenizer else _an_id(declared.get("bos_token_id"))
    pad = _an_id(declared.get("pad_token_id"))
    if pad is None and tokenizer is not None:
        special = tokenizer.special_tokens
        pad = next((special[token] for token in _PAD_TOKENS if token in special), None)
    # transformers makes the row of the padding token zero at a gradient, and refuses one that the table does not have.
    return TokenIds(begin, stops, pad if pad is not None and pad < config.vocab_size else None)


def _an_id(value: object) -> int | None:
    """A token id out of a file; old files say -1 for none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _written(tokenizer: Tokenizer | None, template: ChatTemplate | None) -> dict[str, bytes]:
    """The files of a tokenizer that was read from elsewhere."""
    files = hugging_face_files(tokenizer) if tokenizer else {}
    return files if template is None else {**files, "chat_template.jinja": template.source.encode()}


def _copied(directory: pathlib.Path) -> dict[str, bytes]:
    """The files of the tokenizer in a directory of Hugging Face's, as they are."""
    files = {}
    for name in _TOKENIZER_FILES:
        if (directory / name).is_file():
            with blamed_on(directory):
                files[name] = _small(inside(directory, name))
    return files


def _small(path: pathlib.Path) -> bytes:
    if path.stat().st_size > _LARGEST_TOKENIZER_FILE:
        raise InputError(f"{path.name} is larger than {_LARGEST_TOKENIZER_FILE} bytes; a file of a tokenizer is not")
    return path.read_bytes()
