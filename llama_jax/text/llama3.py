"""Llama 3's tokenizer as Meta shares it: byte pairs with ranks (`tokenizer.model`), special tokens behind them."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping

import tiktoken

from llama_jax.errors import InputError
from llama_jax.text.splitting import LLAMA3_PATTERN
from llama_jax.text.surface import Surface, require_characters
from llama_jax.text.tiktoken_file import read_ranks

# Llama 3.1 and later. In Llama 3.0 the numbers 2 to 5, 8 and 10 to 255 were `<|reserved_special_token_N|>`, N from 0 on
# without a gap; tokenizer.json files of 3.1 have number 5 and 11 reserved still. Ids are the same in all of them.
_NAMED = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|image|>",
)  # fmt: skip
_NUMBER_OF_SPECIAL = 256
SPECIAL_TOKENS = (*_NAMED, *(f"<|reserved_special_token_{2 + n}|>" for n in range(_NUMBER_OF_SPECIAL - len(_NAMED))))

# Meta's code cuts text here, since the library's regular expressions fail on longer runs; ids depend on where it is cut.
_LONGEST_TEXT = 400_000
_LONGEST_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")

_LLAMA4_RANKS = 200_000


@dataclasses.dataclass(frozen=True)
class Llama3Tokenizer:
    """A `llama_jax.text.tokenizer.Tokenizer` of ranked byte pairs, with Llama 3's pattern and special tokens.

    Attributes:
      tokens: bytes of the ordinary tokens in the order of ranks, which are their ids; all single bytes among them.
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
        """Special tokens and their ids, behind the ranks in the order of Meta's code."""
        return {token: len(self.tokens) + n for n, token in enumerate(SPECIAL_TOKENS)}

    @functools.cached_property
    def surface(self) -> Surface:
        """The bytes of every token."""
        return Surface((*self.tokens, *[b""] * _NUMBER_OF_SPECIAL), {})

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        return tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens written in it stay text, nothing is added.

        Raises:
          InputError: for text that is not valid Unicode.
        """
        return [token for piece in _pieces(require_characters(text)) for token in self._encoding.encode_ordinary(piece)]

    def encode_after_special(self, text: str) -> list[int]:
        """As `encode`: no word begins anywhere but where the text has it."""
        return self.encode(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, special ones left out."""
        return self.surface.decode(tokens)


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
    """Whether a run is longer than 25,000 characters: it then covers a place whose number is a multiple of that."""
    return any(_run_length(text, place) > _LONGEST_RUN for place in range(_LONGEST_RUN, len(text), _LONGEST_RUN))


def _run_length(text: str, place: int) -> int:
    """Length of the run that covers a place, counted from 25,000 characters before it at the earliest."""
    before = text[place - _LONGEST_RUN : place]
    behind = _RUN.match(text, place)
    ahead = 0 if behind is None else behind.end() - place
    if text[place].isspace():
        return ahead + len(before) - len(before.rstrip())
    return ahead + (0 if before[-1].isspace() else len(before.split()[-1]))


def load_llama3(path: pathlib.Path) -> Llama3Tokenizer:
    """Reads Llama 3's `tokenizer.model`. Files with another number of ranks get the special tokens behind theirs.

    Raises:
      InputError: for a damaged file, and for Llama 4's, which is cut by another pattern.
    """
    tokens = read_ranks(path)
    if len(tokens) == _LLAMA4_RANKS:
        raise InputError(f"{path}: {len(tokens)} ranks given, as Llama 4 has them; Llama 3's file (128000 ranks) is expected")
    return Llama3Tokenizer(tokens)
