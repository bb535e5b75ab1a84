"""How byte-level tokenizers cut text into words before they merge pairs: the rules that have a name
in GGUF files.

Source: the patterns of llama.cpp's `llama-vocab.cpp`, and of Meta's and OpenAI's own tokenizers.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers

from llama_jax.errors import InputError

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    """Text as characters that stand for bytes; `use_regex` splits it by GPT-2's pattern before."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _isolate(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _llama3_splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([_isolate(LLAMA3_PATTERN), _byte_level(False)])


def _smollm_splitter() -> pre_tokenizers.PreTokenizer:
    """Each digit alone, then GPT-2's pattern. (The conversion in transformers 5 leaves the digits
    out.)
    """
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level(True)]
    )


def _gpt2_splitter() -> pre_tokenizers.PreTokenizer:
    return _byte_level(True)


def _default_splitter() -> pre_tokenizers.PreTokenizer:
    """What llama.cpp does with the name `default`: not GPT-2's pattern alone, but punctuation and
    digits besides.
    """
    cuts = map(_isolate, (r"[\p{P}$+<=>^~|]+", GPT2_PATTERN, r"\p{N}+", "[0-9][0-9][0-9]"))
    return pre_tokenizers.Sequence([*cuts, _byte_level(False)])


# Patterns of models that are built like LLaMA: Qwen 2, and one step of DeepSeek's.
_KNOWN_PATTERNS = {
    LLAMA3_PATTERN,
    GPT2_PATTERN,
    LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}"),
    r"\s+$",
}
_LONGEST_PATTERN = 2000
_ATOM = (
    r"(?:\\[pP]\{\^?\w+\}|\\[dDsSwWrnt]|\\[^\w\s]|\[\^?(?:\\.|[^\[\]\\])+\]|[^\\\[\](){}.*+?^$|])"
)
_WORD = rf"(?:{_ATOM}\??){{0,7}}{_ATOM}(?:[?*+]|\{{\d\d?(?:,\d?\d?)?\}})?"
_SIMPLE = re.compile(rf"{_WORD}(?:\|{_WORD})*")


def is_bounded(pattern: str) -> bool:
    """Whether a regular expression of a file takes time in proportion to the text, as far as can be
    told from outside.

    It does if it is a known one, or if it is simple: every alternative a few characters or classes,
    of which only the last may repeat, so that a match never has to be tried again.
    """
    return pattern in _KNOWN_PATTERNS or (
        len(pattern) <= _LONGEST_PATTERN and _SIMPLE.fullmatch(pattern) is not None
    )


class SplitRule(NamedTuple):
    """How text is cut into words before pairs are merged.

    Attributes:
      splitter: makes the cutter, an object of the tokenizers library.
      whole_words: a word that is itself in the vocabulary is one token, whatever the merges say.
      adds_begin: whether prompts begin with the begin token where the file does not say.
    """

    splitter: Callable[[], pre_tokenizers.PreTokenizer]
    whole_words: bool
    adds_begin: bool


# Names of Llama 3's pattern, with what else llama.cpp's `llama-vocab.cpp` says of each: those of
# its type LLAMA3 take whole words first and begin with the begin token; DBRX, SMAUG (Llama 3's
# derivatives whose tokenizer.json lacks `ignore_merges`) and CHATGLM4 do neither.
_LLAMA3_NAMES = (
    "llama-bpe",
    "llama-v3",
    "llama3",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
)
_LLAMA3_MERGING = ("smaug-bpe", "dbrx", "glm4", "chatglm-bpe")

SPLIT_RULES = {
    **{
        name: SplitRule(_llama3_splitter, whole_words=True, adds_begin=True)
        for name in _LLAMA3_NAMES
    },
    **{
        name: SplitRule(_llama3_splitter, whole_words=False, adds_begin=False)
        for name in _LLAMA3_MERGING
    },
    "smollm": SplitRule(_smollm_splitter, whole_words=False, adds_begin=False),
    "gpt-2": SplitRule(_gpt2_splitter, whole_words=False, adds_begin=False),
    "default": SplitRule(_default_splitter, whole_words=False, adds_begin=False),
}


# --- token_bytes ---
#
# What each token id adds to decoded text, in bytes: a character may be cut between two tokens, a
# byte never is.


class TokenBytes(NamedTuple):
    """The bytes of every token.

    Attributes:
      pieces: UTF-8 bytes by token id; empty for special tokens, which are no part of the text.
      opening: bytes of those tokens that read differently where a text begins: SentencePiece writes
        a space before the first word and takes it away again.
    """

    pieces: tuple[bytes, ...]
    opening: Mapping[int, bytes]

    def piece(self, token: int, begins: bool) -> bytes:
        """The bytes of one token; `begins` says that no text came before it.

        Raises:
          InputError: for an id outside the vocabulary.
        """
        if not 0 <= token < len(self.pieces):
            raise InputError(
                f"token id {token}: the tokenizer has {len(self.pieces)} tokens, numbered from 0"
            )
        return self.opening.get(token, self.pieces[token]) if begins else self.pieces[token]

    def walk(self, tokens: Iterable[int]) -> Iterator[bytes]:
        """The bytes of each token in turn."""
        begins = True
        for token in tokens:
            yield self.piece(token, begins)
            begins = begins and not self.pieces[token]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; bytes that form no character become U+FFFD, as Unicode recommends."""
        return b"".join(self.walk(tokens)).decode("utf-8", errors="replace")


def require_characters(text: str) -> str:
    """The text itself.

    Raises:
      InputError: if it holds half of a surrogate pair, which no UTF-8 file can contain (undecodable
        input does).
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise InputError(
            f"text holds {found}, half of a surrogate pair; give text that is valid UTF-8"
        ) from None
    return text
