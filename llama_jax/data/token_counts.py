"""How often each token is a target: counted while tokens are written, kept in a file, so that no start reads the tokens."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from llama_jax.data.atomic import atomic_write
from llama_jax.data.tokens import TokenCounts, Tokens, pieces

_COUNTED_AT_ONCE = 1 << 20  # tokens: counting has a cost for each piece that grows with the vocabulary
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
            self._targets += np.bincount(np.concatenate(self._waiting), minlength=len(self._targets))
        self._waiting, self._size = [], 0

    def counts(self) -> TokenCounts:
        """What was counted so far."""
        self._count()
        return TokenCounts(self._targets.copy(), self._largest)


def count_tokens(tokens: Tokens) -> TokenCounts:
    """Counts the targets of evaluation: all that is learned from but the first token of each document; reads everything."""
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
      counts: what it holds.
      key: what was counted; `read_counts` compares it.
    """
    targets = counts.targets.tolist()
    values = {"key": key, "largest": counts.largest, "crc32": _checksum(targets, counts.largest), "targets": targets}
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
        if not fits or values["crc32"] != _checksum(targets, largest) or (key is not None and values["key"] != key):
            return None
        return TokenCounts(np.array(targets, np.int64), largest)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _checksum(targets: list[int], largest: int) -> int:
    return zlib.crc32(json.dumps([largest, targets]).encode())
