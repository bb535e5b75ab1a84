"""Llama 3's tokenizer as Meta shares it: byte pairs with ranks (`tokenizer.model`), special tokens
behind them.
"""

import base64
import binascii
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

import tiktoken

from llama_jax.errors import InputError
from llama_jax.text.byte_level import LLAMA3_PATTERN, TokenBytes, require_characters

# --- tiktoken file ---
#
# Reads the tiktoken text form of a byte-pair vocabulary: a line a token, in base64, then a space
# and its rank.
#
# The loader of the tiktoken library is not used: it caches files in a folder that everybody can
# write to and answers from there. Source of the form: Meta's `tokenizer.model` of Llama 3, 128,000
# such lines.


_LARGEST_FILE = 32 << 20  # Llama 3's has 2.1 MiB
_LONGEST_TOKEN = 1024  # bytes; Llama 3's has 128
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (0|[1-9]\d{0,8})\s*")


def is_tiktoken(head: bytes) -> bool:
    """Whether a file that begins so is of this form."""
    return _LINE.fullmatch(head.partition(b"\n")[0]) is not None


def read_ranks(path: pathlib.Path) -> tuple[bytes, ...]:
    """The tokens of a file in the order of their ranks, the lowest of which merges first.

    Raises:
      InputError: for a file above 32 MiB, a line that is not of the form, a rank that is not the
        number of its line (counted from 0), a token that is empty, too long or stands there twice,
        and a byte that no token spells.
    """
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise InputError(
            f"{path}: {size} bytes given, at most {_LARGEST_FILE} expected of tiktoken ranks"
        )
    ranks: dict[bytes, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                _add(ranks, line, f"{path}: line {number}")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise InputError(
            f"{path}: byte 0x{missing:02X} has no rank, all 256 expected; the file is "
            "damaged or cut off"
        )
    return tuple(ranks)


def _add(ranks: dict[bytes, int], line: bytes, origin: str) -> None:
    """Adds the token of a line, whose rank is the next one."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise InputError(
            f"{origin}: {line[:40]!r} given, a token in base64, a space and its rank expected"
        )
    token = _decoded(match[1], origin)
    if int(match[2]) != len(ranks):
        raise InputError(
            f"{origin}: rank {int(match[2])} given, {len(ranks)} expected; ranks go up "
            "from 0 without a gap"
        )
    if ranks.setdefault(token, len(ranks)) != int(match[2]):
        raise InputError(
            f"{origin}: token {token[:40]!r} stands there twice, with ranks "
            f"{ranks[token]} and {int(match[2])}"
        )


def _decoded(token: bytes, origin: str) -> bytes:
    """The bytes of a token."""
    try:
        decoded = base64.b64decode(token, validate=True)
    except binascii.Error as error:
        raise InputError(f"{origin}: {token[:40]!r} is not base64 ({error})") from None
    if not 0 < len(decoded) <= _LONGEST_TOKEN:
        raise InputError(
            f"{origin}: a token of {len(decoded)} bytes given, 1 to {_LONGEST_TOKEN} expected"
        )
    return decoded


# --- llama3 ---


# Llama 3.1 and later. In Llama 3.0 the numbers 2 to 5, 8 and 10 to 255 were
# `<|reserved_special_token_N|>`, N from 0 on without a gap; tokenizer.json files of 3.1 have number
# 5 and 11 reserved still. Ids are the same in all of them.
_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
_NUMBER_OF_SPECIAL = 256
SPECIAL_TOKENS = (
    *_NAMED,
    *(f"<|reserved_special_token_{2 + n}|>" for n in range(_NUMBER_OF_SPECIAL - len(_NAMED))),
)

# Meta's code cuts text here, since the library's regular expressions fail on longer runs; ids
# depend on where it is cut.
_LONGEST_TEXT = 400_000
_LONGEST_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")

_LLAMA4_RANKS = 200_000


@dataclasses.dataclass(frozen=True)
class Llama3Tokenizer:
    """A `llama_jax.text.tokenizer.Tokenizer` of ranked byte pairs, with Llama 3's pattern and
    special tokens.

    Attributes:
      tokens: bytes of the ordinary tokens in the order of ranks, which are their ids; all single
        bytes among them.
      adds_begin: whether a plain prompt begins with `<|begin_of_text|>`.
    """

    tokens: tuple[bytes, ...] = dataclasses.field(repr=False)
    adds_begin: bool = True

    @property
    def vocab_size(self) -> int:
        """Number of token ids: the ranks and 256 special tokens."""
        return len(self.tokens) + _NUMBER_OF_SPECIAL

    @property
    def begin_id(self) -> int:
        """Id of `<|begin_of_text|>`."""
        return self.special_tokens["<|begin_of_text|>"]

    @property
    def end_id(self) -> int:
        """Id of `<|end_of_text|>`."""
        return self.special_tokens["<|end_of_text|>"]

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Special tokens and their ids, after the ranks in the order of Meta's code."""
        return {token: len(self.tokens) + n for n, token in enumerate(SPECIAL_TOKENS)}

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of every token."""
        return TokenBytes((*self.tokens, *[b""] * _NUMBER_OF_SPECIAL), {})

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        return tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in it stay text, nothing is added.

        Raises:
          InputError: for text that is not valid Unicode.
        """
        return [
            token
            for piece in _pieces(require_characters(text))
            for token in self._encoding.encode_ordinary(piece)
        ]

    def encode_after_special(self, text: str) -> list[int]:
        """As `encode`: no word begins anywhere but where the text has it."""
        return self.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.token_bytes.decode(tokens)


def _pieces(text: str) -> Iterator[str]:
    """The text in stretches without a run of more than 25,000 white spaces or other characters."""
    for start in range(0, len(text), _LONGEST_TEXT):
        yield from _between_cuts(text[start : start + _LONGEST_TEXT])


def _between_cuts(text: str) -> Iterator[str]:
    """One text of at most 400,000 characters, cut inside its overlong runs."""
    start = 0
    for run in _RUN.finditer(text) if _has_overlong_run(text) else ():
        for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _has_overlong_run(text: str) -> bool:
    """Whether a run is longer than 25,000 characters: it then covers a place whose number is a
    multiple of that.
    """
    return any(
        _run_length(text, place) > _LONGEST_RUN
        for place in range(_LONGEST_RUN, len(text), _LONGEST_RUN)
    )


def _run_length(text: str, place: int) -> int:
    """Length of the run that covers a place, counted from 25,000 characters before it at the
    earliest.
    """
    before = text[place - _LONGEST_RUN : place]
    behind = _RUN.match(text, place)
    ahead = 0 if behind is None else behind.end() - place
    if text[place].isspace():
        return ahead + len(before) - len(before.rstrip())
    return ahead + (0 if before[-1].isspace() else len(before.split()[-1]))


def load_llama3(path: pathlib.Path) -> Llama3Tokenizer:
    """Reads Llama 3's `tokenizer.model`. Files with another number of ranks get the special tokens
    behind theirs.

    Raises:
      InputError: for a damaged file, and for Llama 4's, which is cut by another pattern.
    """
    tokens = read_ranks(path)
    if len(tokens) == _LLAMA4_RANKS:
        raise InputError(
            f"{path}: {len(tokens)} ranks given, as Llama 4 has them; Llama 3's file "
            "(128000 ranks) is expected"
        )
    return Llama3Tokenizer(tokens)
