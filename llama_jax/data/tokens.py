"""Tokens as batches read them: one long sequence of documents, whatever files it lies in."""

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, Int64

from llama_jax.storage import atomic_write


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
        """UTF-8 bytes of the targets."""
        ...

    @property
    def vocab_size(self) -> int:
        """Every token is below it."""
        ...

    def read(self, first: int, stop: int) -> Piece:
        """The tokens from `first` to `stop - 1`; fewer where they end before.

        Raises:
          CorruptError: for a token outside the vocabulary: the file was damaged after it was
            written.
        """
        ...

    def lengths(self) -> Int64[Any, "documents"]:
        """Tokens of each document."""
        ...

    def counts(self) -> TokenCounts:
        """Which tokens occur, by the counts that were kept when they were written.

        Raises:
          CorruptError: the counts are missing or damaged.
        """
        ...


READ_AT_ONCE = 1 << 22  # tokens


def pieces(tokens: Tokens) -> list[tuple[int, int]]:
    """Borders of the parts in which all tokens are gone through, so that a pass over mapped files
    needs little memory.
    """
    return [
        (first, min(first + READ_AT_ONCE, tokens.size))
        for first in range(0, tokens.size, READ_AT_ONCE)
    ]


def joined(parts: list[Piece]) -> Piece:
    """Neighbouring pieces as one."""
    return (
        parts[0] if len(parts) == 1 else Piece(*[np.concatenate(column) for column in zip(*parts)])
    )


# --- token counts ---
#
# How often each token is a target: counted while tokens are written, kept in a file, so that no
# start reads the tokens.


_COUNTED_AT_ONCE = (
    1 << 20
)  # tokens: counting has a cost for each piece that grows with the vocabulary
_LARGEST_FILE = 1 << 28  # bytes


class Counter:
    """Counts documents one after another.

    Args:
      vocab_size: every token is below it.
    """

    def __init__(self, vocab_size: int) -> None:
        self._targets, self._largest = np.zeros(vocab_size, np.int64), -1
        self._waiting: list[np.ndarray] = []
        self._size = 0

    def add(self, ids: Int64[Any, " T"], learned: Bool[Any, " T"] | None) -> None:
        """Counts a document, whose first token is no target.

        Args:
          ids: its tokens.
          learned: which of them are learned from; `None` for all.
        """
        self._largest = max(self._largest, int(ids.max(initial=-1)))
        self._waiting.append(ids[1:] if learned is None else ids[1:][learned[1:]])
        self._size += len(ids)
        if self._size >= _COUNTED_AT_ONCE:
            self._count()

    def _count(self) -> None:
        if self._waiting:
            self._targets += np.bincount(
                np.concatenate(self._waiting), minlength=len(self._targets)
            )
        self._waiting, self._size = [], 0

    def counts(self) -> TokenCounts:
        """What was counted so far."""
        self._count()
        return TokenCounts(self._targets.copy(), self._largest)


def count_tokens(tokens: Tokens) -> TokenCounts:
    """Counts the targets of evaluation: all that is learned from but the first token of each
    document; reads everything.
    """
    targets, largest = np.zeros(tokens.vocab_size, np.int64), -1
    for first, stop in pieces(tokens):
        ids, begins, learned = tokens.read(first, stop)
        targets += np.bincount(ids[learned & ~begins], minlength=len(targets))
        largest = max(largest, int(ids.max(initial=-1)))
    return TokenCounts(targets, largest)


def add_counts(first: TokenCounts, second: TokenCounts) -> TokenCounts:
    """The counts of both, of one vocabulary."""
    return TokenCounts(first.targets + second.targets, max(first.largest, second.largest))


def write_counts(path: Path, counts: TokenCounts, key: str) -> None:
    """Writes counts, whole or not at all.

    Args:
      path: file to write.
      counts: to write.
      key: identity of the counted tokens; `read_counts` compares it.
    """
    targets = counts.targets.tolist()
    values = {
        "key": key,
        "largest": counts.largest,
        "crc32": _checksum(targets, counts.largest),
        "targets": targets,
    }
    with atomic_write(path) as file:
        file.write((json.dumps(values) + "\n").encode())


def read_counts(path: Path, vocab_size: int, key: str | None = None) -> TokenCounts | None:
    """The counts of a file; `None` if there is none, or it is damaged, or of something else.

    Args:
      path: of `write_counts`.
      vocab_size: of the tokens.
      key: what must have been counted; `None` for anything.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return None
        values = json.loads(path.read_bytes())
        targets, largest = values["targets"], values["largest"]
        fits = len(targets) == vocab_size and type(largest) is int and -1 <= largest < vocab_size
        if (
            not fits
            or values["crc32"] != _checksum(targets, largest)
            or (key is not None and values["key"] != key)
        ):
            return None
        return TokenCounts(np.array(targets, np.int64), largest)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _checksum(targets: list[int], largest: int) -> int:
    return zlib.crc32(json.dumps([largest, targets]).encode())


# --- unigram ---
#
# The baseline that any language model must beat: how often each token occurs.


def unigram_cross_entropy(train: Sequence[Tokens], held_out: Sequence[Tokens]) -> float:
    """Nats per token of `held_out` under the token frequencies of `train`, each count raised by
    one.

    The targets are those of evaluation: all tokens but the first of each document, and of
    conversations only what the assistant says. Reads the counts that were kept when the tokens were
    written, not the tokens.
    """
    size = max(tokens.vocab_size for tokens in (*train, *held_out))
    counts, targets = _sum_targets(train, size) + 1, _sum_targets(held_out, size)
    return math.log(counts.sum()) - float(targets @ np.log(counts)) / max(1.0, float(targets.sum()))


def _sum_targets(parts: Sequence[Tokens], size: int) -> np.ndarray:
    total = np.zeros(size, np.int64)
    for tokens in parts:
        targets = tokens.counts().targets
        total[: len(targets)] += targets
    return total
