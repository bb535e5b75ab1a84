"""Tokenizers with one protocol: text to token ids and back, at once or token by token."""

import codecs
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import tokenizers
from tokenizers import AddedToken, pre_tokenizers

from llama_jax.errors import InputError
from llama_jax.text.byte_level import TokenBytes
from llama_jax.text.byte_pair import BytePairTokenizer, byte_pair_from_pieces, load_byte_pair
from llama_jax.text.files import is_text, read_json, role_tokens, special_token, template_text
from llama_jax.text.llama3 import is_tiktoken, load_llama3
from llama_jax.text.sentencepiece import SentencePieceTokenizer, load_sentence_piece

# --- added tokens ---
#
# Tokens that lie beside a SentencePiece model: `added_tokens.json`, or `added_tokens_decoder` in
# `tokenizer_config.json`.
#
# Source: transformers 5, whose ids these are: text is cut at added tokens, and each stretch is
#   encoded on its own; it begins a
# word only at the start of a text, or everywhere where `legacy` is true.


_SPACE = "\u2581"
_LONGEST_TOKEN = 1024  # characters
_MOST_ADDED = 1 << 16
_FILE, _CONFIG = "added_tokens.json", "tokenizer_config.json"
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)


def with_added_tokens(
    tokenizer: SentencePieceTokenizer, directory: pathlib.Path
) -> SentencePieceTokenizer | BytePairTokenizer:
    """A SentencePiece tokenizer with the tokens that the files beside it add; itself where they add
    none.

    Args:
      tokenizer: of the `tokenizer.model` in the directory.
      directory: where the files are.

    Raises:
      InputError: for damaged files, ids that leave a hole or are another token's, and models whose
        tokens cannot be joined by others (see `byte_pair_from_pieces`).
    """
    added = {
        token: text for token, text in _declared(directory).items() if token >= tokenizer.vocab_size
    }
    if not added:
        return tokenizer
    _require_dense(added, tokenizer.vocab_size, directory)
    config = read_json(directory / _CONFIG)
    special = _special(directory, config)
    promoted = role_tokens(
        (text for text in added.values() if text not in special), template_text(directory)
    )
    joined = byte_pair_from_pieces(tokenizer)
    library = _as_transformers(joined.tokenizer, bool(config.get("legacy")))
    control = special.union(promoted)
    for _, text in sorted(added.items()):
        token = AddedToken(text, normalized=False)
        (library.add_special_tokens if text in control else library.add_tokens)([token])
    begin, end = (
        library.token_to_id(str(special_token(directory, role)))
        for role in ("bos_token", "eos_token")
    )
    return dataclasses.replace(
        joined,
        tokenizer=library,
        promoted=promoted,
        begin_id=joined.begin_id if begin is None else begin,
        end_id=joined.end_id if end is None else end,
    )


def _declared(directory: pathlib.Path) -> dict[int, str]:
    """Texts by id, of both files, which have to agree."""
    found: dict[int, str] = {}
    decoder = read_json(directory / _CONFIG).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise InputError(
            f"{directory / _CONFIG}: added_tokens_decoder is {decoder!r:.60}, an object expected"
        )
    pairs: list[tuple[Any, Any, str]] = [
        (text, token, _FILE) for text, token in read_json(directory / _FILE).items()
    ]
    pairs += [
        (entry.get("content") if isinstance(entry, dict) else None, _number(token), _CONFIG)
        for token, entry in decoder.items()
    ]
    for text, token, file in pairs:
        if (
            not is_text(text)
            or not 0 < len(text) <= _LONGEST_TOKEN
            or type(token) is not int
            or token < 0
        ):
            raise InputError(
                f"{directory / file}: {text!r:.60} with id {token!r:.20} given, a token "
                "and its id expected"
            )
        if found.setdefault(token, text) != text:
            raise InputError(
                f"{directory / file}: id {token} is {text!r:.60} here and "
                f"{found[token]!r:.60} elsewhere"
            )
    return found


def _number(token: str) -> int | str:
    """An id that is a key of an object, so spelled in digits."""
    return int(token) if token.isascii() and token.isdigit() and len(token) < 10 else token


def _require_dense(added: Mapping[int, str], size: int, directory: pathlib.Path) -> None:
    """Refuses ids after a gap, which the tokenizers library cannot give, and one text with two
    ids.
    """
    last = size + len(added) - 1
    if max(added) != last or len(added) > _MOST_ADDED or len({*added.values()}) != len(added):
        raise InputError(
            f"{directory}: added tokens have the ids {min(added)} to {max(added)}, each "
            f"{size} to {last} once "
            f"expected behind the {size} of tokenizer.model; save the tokenizer as tokenizer.json"
        )


def _special(directory: pathlib.Path, config: Mapping[str, Any]) -> set[str]:
    """The texts that some file calls special."""
    marked = [
        entry
        for entry in (config.get("added_tokens_decoder") or {}).values()
        if entry.get("special")
    ]
    found: list[Any] = [*marked, *(special_token(directory, role) for role in _ROLES)]
    for values in (config, read_json(directory / "special_tokens_map.json")):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            extra = values.get(key)
            found += (
                extra.values()
                if isinstance(extra, dict)
                else extra
                if isinstance(extra, list)
                else []
            )
    texts = (entry.get("content") if isinstance(entry, dict) else entry for entry in found)
    return {text for text in texts if isinstance(text, str)}


def _as_transformers(library: tokenizers.Tokenizer, legacy: bool) -> tokenizers.Tokenizer:
    """The tokenizer with a space put before the first stretch of a text, or before every one, where
    there is none yet.
    """
    if "Prepend" in str(library.normalizer):
        library.normalizer = None
        library.pre_tokenizer = pre_tokenizers.Metaspace(
            _SPACE, "always" if legacy else "first", split=False
        )
    return library


# --- tokenizer ---


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
    def token_bytes(self) -> TokenBytes:
        """The bytes of every token."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in it stay text, no begin or end is added."""
        ...

    def encode_after_special(self, text: str) -> list[int]:
        """As `encode`, for text that follows a special token: not every tokenizer begins a
        word there.
        """
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; special tokens are no part of it."""
        ...


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a plain prompt, with the begin token first where the model expects it; `encode`
    never adds one.

    Args:
      tokenizer: of the model.
      text: special tokens written in it stay text.
    """
    begin = [tokenizer.begin_id] if tokenizer.adds_begin and tokenizer.begin_id is not None else []
    return begin + tokenizer.encode(text)


class StreamDecoder:
    """Decodes a text token by token, at a cost per token that does not grow with the text.

    The returned strings joined, `flush` included, are exactly `tokenizer.decode` of all tokens; a
    character whose bytes come in several tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begins = True

    def push(self, token: int) -> str:
        """The text that became certain with this token; may be empty.

        Raises:
          InputError: for an id outside the vocabulary.
        """
        piece = self._token_bytes.piece(token, self._begins)
        self._begins = self._begins and not self._token_bytes.pieces[token]
        return self._characters.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole. Begins anew."""
        rest = self._characters.decode(b"", final=True)
        self._characters.reset()
        self._begins = True
        return rest


def load_tokenizer(path: pathlib.Path) -> Tokenizer:
    """Reads a tokenizer: `tokenizer.json`, `tokenizer.model` (SentencePiece or Llama 3's ranks), or
    a directory with one.

    A directory with both is read from `tokenizer.json`, which also holds tokens that a fine-tuning
    added.

    Raises:
      InputError: naming the expected file, or the damage.
    """
    if not path.is_dir():
        return _load_file(path)
    found = next(
        (path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()),
        None,
    )
    if found is None:
        raise InputError(
            f"{path}: no tokenizer found; the directory should hold tokenizer.json or "
            "tokenizer.model"
        )
    return _load_file(found)


def _load_file(path: pathlib.Path) -> Tokenizer:
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; give tokenizer.json, tokenizer.model or a directory "
            "with one of them"
        )
    with path.open("rb") as file:
        head = file.read(4096)
    if head.lstrip().startswith(b"{"):
        return load_byte_pair(path)
    if is_tiktoken(head):
        return load_llama3(path)
    tokenizer = with_added_tokens(load_sentence_piece(path), path.parent)
    return _as_declared(tokenizer, path.parent)


def _as_declared(
    tokenizer: SentencePieceTokenizer | BytePairTokenizer, directory: pathlib.Path
) -> Tokenizer:
    """The tokenizer of a `tokenizer.model`, with prompts that begin as `add_bos_token` beside it
    says.
    """
    adds = read_json(directory / "tokenizer_config.json").get("add_bos_token")
    if adds is None:
        return tokenizer
    return dataclasses.replace(tokenizer, adds_begin=bool(adds) and tokenizer.begin_id is not None)
