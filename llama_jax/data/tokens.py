"""Tokens as batches read them: one long row of documents, whatever files it lies in."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, Int64


class Piece(NamedTuple):
    """Neighbouring tokens.

    Attributes:
      ids: the tokens.
      begins: whether a token is the first of a document.
      learned: whether a token is learned from, as a target.
    """

    ids: Int32[Any, " T"]
    begins: Bool[Any, " T"]
    learned: Bool[Any, " T"]


class TokenCounts(NamedTuple):
    """Which tokens occur.

    Attributes:
      targets: how often each token is a target: learned from, and not the first of its document.
      largest: the largest token, target or not; -1 for none.
    """

    targets: Int64[Any, " V"]
    largest: int


@runtime_checkable
class Tokens(Protocol):
    """Documents one after another."""

    @property
    def name(self) -> str:
        """Where they are, for messages."""
        ...

    @property
    def kind(self) -> str:
        """`text`, `chat` or `pairs`, as in a token file's header."""
        ...

    @property
    def size(self) -> int:
        """Number of tokens."""
        ...

    @property
    def documents(self) -> int:
        """Number of documents."""
        ...

    @property
    def bytes_of_text(self) -> int:
        """UTF-8 bytes of what is learned from."""
        ...

    @property
    def vocab_size(self) -> int:
        """Every token is below it."""
        ...

    def read(self, first: int, stop: int) -> Piece:
        """The tokens from `first` to `stop - 1`; fewer where they end before.

        Raises:
          CorruptError: for a token outside the vocabulary: the file was damaged after it was written.
        """
        ...

    def lengths(self) -> Int64[Any, "documents"]:
        """Tokens of each document."""
        ...

    def counts(self) -> TokenCounts:
        """Which tokens occur, from what was kept when they were written.

        Raises:
          CorruptError: what was kept is missing or damaged.
        """
        ...


READ_AT_ONCE = 1 << 22  # tokens


def pieces(tokens: Tokens) -> list[tuple[int, int]]:
    """Borders of the parts in which all tokens are gone through, so that a pass over mapped files needs little memory."""
    return [(first, min(first + READ_AT_ONCE, tokens.size)) for first in range(0, tokens.size, READ_AT_ONCE)]


def joined(parts: list[Piece]) -> Piece:
    """Neighbouring pieces as one."""
    return parts[0] if len(parts) == 1 else Piece(*[np.concatenate(column) for column in zip(*parts)])
