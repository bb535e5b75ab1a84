"""The tokenizer inside a GGUF file, rebuilt from its metadata.

Source: llama.cpp, which defines the format.
"""

import collections
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, decoders, models

from llama_jax.errors import InputError
from llama_jax.formatting import one_line
from llama_jax.text.byte_level import SPLIT_RULES, require_characters
from llama_jax.text.byte_pair import BytePairTokenizer
from llama_jax.text.files import role_tokens
from llama_jax.text.sentencepiece import (
    Piece,
    SentencePieceTokenizer,
    model_proto,
    processor_from_bytes,
)
from llama_jax.text.tokenizer import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # token types; 5 is unused
_UNKNOWN_TOKEN = "<unk>"
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")

_LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>")
_LARGEST_SCORE = 1e30
_LONGEST_TOKEN = 1024  # characters


class _Vocabulary(NamedTuple):
    """Tokens by id, with their types, and those that are control although the file calls them
    user-defined.
    """

    tokens: list[str]
    kinds: list[int]
    promoted: tuple[str, ...]

    def of_kind(self, kind: int) -> list[str]:
        """The tokens of one type, in the order of their ids."""
        return [token for token, its_kind in zip(self.tokens, self.kinds) if its_kind == kind]


def tokenizer_from_gguf(metadata: Mapping[str, object]) -> Tokenizer:
    """The tokenizer that GGUF metadata describe.

    Args:
      metadata: the file's keys and values; those that begin with `tokenizer.ggml.` are read.

    Raises:
      InputError: naming the key that is missing or wrong, or the kind or splitting rule that is
        unknown.
    """
    kind = _value(metadata, "model", str)
    if kind not in _READERS:
        raise InputError(
            f"tokenizer.ggml.model: {kind!r:.60} given, {' or '.join(_READERS)} expected"
        )
    return _READERS[kind](metadata)


def _byte_pair(metadata: Mapping[str, object]) -> BytePairTokenizer:
    """Kind `gpt2`: byte-level pairs, merged in the order of a list."""
    name = _value(metadata, "pre", str, assumed_rule(metadata))
    if name not in SPLIT_RULES:
        raise InputError(
            f"tokenizer.ggml.pre: {name!r:.60} is unknown; known are {', '.join(SPLIT_RULES)}"
        )
    rule, vocabulary = SPLIT_RULES[name], _vocabulary(metadata)
    merges = [tuple(merge.split(" ")) for merge in _values(metadata, "merges", str)]
    identity = {token: number for number, token in enumerate(vocabulary.tokens)}
    try:
        tokenizer = tokenizers.Tokenizer(
            models.BPE(identity, merges, ignore_merges=rule.whole_words)
        )
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"tokenizer.ggml.merges: they do not fit the tokens ({one_line(error)})"
        ) from None
    tokenizer.pre_tokenizer = rule.splitter()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in vocabulary.of_kind(_CONTROL)]
    )
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t in vocabulary.of_kind(_USER_DEFINED)]
    )
    begin = _token_id(metadata, "bos_token_id", vocabulary, None)
    end = _token_id(metadata, "eos_token_id", vocabulary, None)
    adds_begin = _value(metadata, "add_bos_token", bool, rule.adds_begin)
    return BytePairTokenizer(
        tokenizer, begin, end, adds_begin and begin is not None, vocabulary.promoted
    )


def assumed_rule(metadata: Mapping[str, object]) -> str:
    """The splitting rule of a file of kind `gpt2` that names none, as files from before the spring
    of 2024 do.

    Llama 3's where the tokens are Llama 3's; else llama.cpp's default, which it takes for all of
    them, with a warning.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    own = isinstance(tokens, list) and all(token in tokens for token in _LLAMA3_TOKENS)
    return "llama-bpe" if own else "default"


def _sentence_piece(metadata: Mapping[str, object]) -> SentencePieceTokenizer:
    """Kind `llama`: pieces with scores, merged best score first."""
    vocabulary = _with_unknown(metadata, _vocabulary(metadata))
    scores = _scores(metadata, len(vocabulary.tokens))
    if len(scores) != len(vocabulary.tokens):
        raise InputError(
            f"tokenizer.ggml.scores: {len(scores)} given for {len(vocabulary.tokens)} tokens"
        )
    if not all(abs(score) < _LARGEST_SCORE for score in scores):  # nor is it for what is no number
        raise InputError("tokenizer.ggml.scores: finite numbers expected, below 1e30")
    unknown = vocabulary.of_kind(_UNKNOWN)
    if len(unknown) != 1:
        raise InputError(
            f"tokenizer.ggml.token_type: {len(unknown)} unknown tokens (type 2) given, one expected"
        )
    pieces = map(Piece, vocabulary.tokens, scores, vocabulary.kinds)
    model = model_proto(pieces, unknown[0], _value(metadata, "add_space_prefix", bool, True))
    begin = _token_id(metadata, "bos_token_id", vocabulary, 1)
    end = _token_id(metadata, "eos_token_id", vocabulary, 2)
    adds_begin = _value(metadata, "add_bos_token", bool, True)
    processor = processor_from_bytes(model, "tokenizer.ggml.tokens")
    return SentencePieceTokenizer(processor, begin, end, adds_begin, vocabulary.promoted)


def _scores(metadata: Mapping[str, object], count: int) -> list[float]:
    """The scores of all pieces; zeros, with which pairs merge from left to right, where a file has
    none, as in llama.cpp.
    """
    return (
        [0.0] * count
        if "tokenizer.ggml.scores" not in metadata
        else _values(metadata, "scores", float)
    )


def _with_unknown(metadata: Mapping[str, object], vocabulary: _Vocabulary) -> _Vocabulary:
    """The vocabulary with its unknown token of that type: some writers call it control
    (`LlamaHfVocab` of `gguf`).
    """
    if _UNKNOWN in vocabulary.kinds:
        return vocabulary
    number = _token_id(metadata, "unknown_token_id", vocabulary, None)
    if number is None and _UNKNOWN_TOKEN in vocabulary.tokens:
        number = vocabulary.tokens.index(_UNKNOWN_TOKEN)
    kinds = [_UNKNOWN if at == number else kind for at, kind in enumerate(vocabulary.kinds)]
    return vocabulary._replace(kinds=kinds)


_READERS: dict[str, Callable[[Mapping[str, object]], Tokenizer]] = {
    "gpt2": _byte_pair,
    "llama": _sentence_piece,
}


def _vocabulary(metadata: Mapping[str, object]) -> _Vocabulary:
    """The tokens and their types, checked to belong together."""
    tokens = _values(metadata, "tokens", str)
    typed = "tokenizer.ggml.token_type" in metadata
    kinds = _values(metadata, "token_type", int) if typed else _assumed_kinds(metadata, tokens)
    if len(tokens) != len(kinds):
        raise InputError(
            f"tokenizer.ggml.token_type: {len(kinds)} types given for {len(tokens)} tokens"
        )
    token, count = next(iter(collections.Counter(tokens).most_common(1)), ("", 1))
    if count > 1:
        raise InputError(f"tokenizer.ggml.tokens: {token!r:.60} stands there {count} times")
    require_characters("".join(tokens))
    longest = max(map(len, tokens), default=0)
    if longest > _LONGEST_TOKEN:
        raise InputError(
            f"tokenizer.ggml.tokens: a token of {longest} characters given, at most "
            f"{_LONGEST_TOKEN} expected"
        )
    wrong = next((kind for kind in kinds if not 1 <= kind <= 6), None)
    if wrong is not None:
        raise InputError(f"tokenizer.ggml.token_type: type {wrong!r:.20} given, 1 to 6 expected")
    plain = _USER_DEFINED if typed else _NORMAL
    ordinary = (token for token, kind in zip(tokens, kinds) if kind == plain)
    # Of tokens without types only the known ones: "[0]" is a word of a vocabulary, and stands in
    # many a template.
    promoted = role_tokens(
        ordinary, str(metadata.get("tokenizer.chat_template", "")) if typed else ""
    )
    own = set(promoted)
    return _Vocabulary(
        tokens, [_CONTROL if token in own else kind for token, kind in zip(tokens, kinds)], promoted
    )


def _assumed_kinds(metadata: Mapping[str, object], tokens: list[str]) -> list[int]:
    """Types of tokens in a file without them: control for those that begin, end and fill, bytes by
    their names.
    """
    spelled = metadata.get("tokenizer.ggml.model") == "llama"
    defaults = {"bos": 1, "eos": 2} if spelled else {}  # llama.cpp's
    roles = ("bos", "eos", "eot", "eom", "padding")
    control = [
        metadata.get(f"tokenizer.ggml.{role}_token_id", defaults.get(role)) for role in roles
    ]
    return [
        _CONTROL
        if number in control
        else _BYTE
        if spelled and _BYTE_PIECE.fullmatch(token)
        else _NORMAL
        for number, token in enumerate(tokens)
    ]


def _value(metadata: Mapping[str, object], name: str, kind: type, default: Any = None) -> Any:
    """A single value of a given type; without a default it must be there."""
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, kind):
        raise InputError(f"tokenizer.ggml.{name}: {value!r:.60} given, a {kind.__name__} expected")
    return value


def _values(metadata: Mapping[str, object], name: str, kind: type) -> list[Any]:
    """A list of values of a given type."""
    values = _value(metadata, name, list)
    if not all(isinstance(value, kind) for value in values):
        raise InputError(
            f"tokenizer.ggml.{name}: a list of {kind.__name__} expected, another type found in it"
        )
    return values


def _token_id(
    metadata: Mapping[str, object], name: str, vocabulary: _Vocabulary, default: int | None
) -> int | None:
    """An id that must lie in the vocabulary, or `None` where there is none."""
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if value is not None and not (isinstance(value, int) and 0 <= value < len(vocabulary.tokens)):
        raise InputError(
            f"tokenizer.ggml.{name}: {value!r:.60} given, an id below "
            f"{len(vocabulary.tokens)} expected"
        )
    return value
