"""Tokenizers behind one protocol: text to token ids and back, at once or token by token."""

import codecs
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from llama_jax.errors import InputError
from llama_jax.text.added_tokens import with_added_tokens
from llama_jax.text.byte_pair import BytePairTokenizer, load_byte_pair
from llama_jax.text.files import read_json
from llama_jax.text.llama3 import load_llama3
from llama_jax.text.sentence_piece import SentencePieceTokenizer, load_sentence_piece
from llama_jax.text.surface import Surface
from llama_jax.text.tiktoken_file import is_tiktoken


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def begin_id(self) -> int | None:
        """Id of the token that begins a text, or `None`."""
        ...

    @property
    def end_id(self) -> int | None:
        """Id of the token that ends a text, or `None`."""
        ...

    @property
    def adds_begin(self) -> bool:
        """Whether a plain prompt begins with `begin_id`, as the model's own files have it."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Special (control) tokens and their ids."""
        ...

    @property
    def surface(self) -> Surface:
        """The bytes of every token."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in it stay text, no begin or end is added."""
        ...

    def encode_after_special(self, text: str) -> list[int]:
        """As `encode`, for text that stands behind a special token: not every tokenizer begins a word there."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; special tokens are no part of it."""
        ...


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a plain prompt, with the begin token first where the model expects it; `encode` never adds one.

    Args:
      tokenizer: of the model.
      text: special tokens written in it stay text.
    """
    begin = [tokenizer.begin_id] if tokenizer.adds_begin and tokenizer.begin_id is not None else []
    return begin + tokenizer.encode(text)


class StreamDecoder:
    """Decodes a text token by token, at a cost per token that does not grow with the text.

    The returned strings joined, `flush` included, are exactly `tokenizer.decode` of all tokens; a character whose
    bytes come in several tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._surface = tokenizer.surface
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begins = True

    def push(self, token: int) -> str:
        """The text that became certain with this token; may be empty.

        Raises:
          InputError: for an id outside the vocabulary.
        """
        piece = self._surface.piece(token, self._begins)
        self._begins = self._begins and not self._surface.pieces[token]
        return self._characters.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole. Begins anew."""
        rest = self._characters.decode(b"", final=True)
        self._characters.reset()
        self._begins = True
        return rest


def load_tokenizer(path: pathlib.Path) -> Tokenizer:
    """Reads a tokenizer: `tokenizer.json`, `tokenizer.model` (SentencePiece or Llama 3's ranks), or a directory with one.

    A directory with both is read from `tokenizer.json`, which also holds tokens that a fine-tuning added.

    Raises:
      InputError: naming what was looked for, or what is wrong with the file.
    """
    if not path.is_dir():
        return _load_file(path)
    found = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), None)
    if found is None:
        raise InputError(f"{path}: no tokenizer found; the directory should hold tokenizer.json or tokenizer.model")
    return _load_file(found)


def _load_file(path: pathlib.Path) -> Tokenizer:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give tokenizer.json, tokenizer.model or a directory with one of them")
    with path.open("rb") as file:
        head = file.read(4096)
    if head.lstrip().startswith(b"{"):
        return load_byte_pair(path)
    if is_tiktoken(head):
        return load_llama3(path)
    tokenizer = with_added_tokens(load_sentence_piece(path), path.parent)
    return _as_declared(tokenizer, path.parent)


def _as_declared(tokenizer: SentencePieceTokenizer | BytePairTokenizer, directory: pathlib.Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.model`, with prompts that begin as `add_bos_token` beside it says."""
    adds = read_json(directory / "tokenizer_config.json").get("add_bos_token")
    if adds is None:
        return tokenizer
    return dataclasses.replace(tokenizer, adds_begin=bool(adds) and tokenizer.begin_id is not None)
