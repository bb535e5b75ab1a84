"""Packing whole documents into rows: best fit, the longest first."""

import bisect
from collections.abc import Iterator

import numpy as np


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The row of each document: the fullest one that still has room for it, a new one where none has.

    The longest are placed first. Documents of one length are placed together: the fullest row with room for one stays
    the fullest, so it takes as many as fit, and rows with the same room left take as many each. A million documents
    thus take as many steps as there are different lengths, a few times over.

    Args:
      lengths: of the documents, from 1 to `room`.
      room: of a row.

    Returns:
      int64, a row number from 0 for each document; every number up to the largest is used.
    """
    rows, open_rows = np.empty(len(lengths), np.int64), _OpenRows(room)
    for length, documents in _longest_first(lengths):
        placed = 0
        while placed < len(documents):
            left, candidates = open_rows.fullest(length, len(documents) - placed)
            each = left // length
            whole = min(len(candidates), (len(documents) - placed) // each)
            rows[documents[placed : placed + whole * each]] = np.repeat(candidates[:whole], each)
            open_rows.put(left - each * length, candidates[:whole])
            placed += whole * each
            rest = candidates[whole:]
            if rest.size and placed < len(documents):
                rows[documents[placed:]] = rest[0]
                open_rows.put(left - (len(documents) - placed) * length, rest[:1])
                placed, rest = len(documents), rest[1:]
            open_rows.put(left, rest)
    return rows


def _longest_first(lengths: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each length that occurs with its documents, in their order."""
    order = np.argsort(-lengths, kind="stable")
    borders = np.flatnonzero(np.diff(lengths[order])) + 1
    for documents in np.split(order, borders):
        if documents.size:
            yield int(lengths[documents[0]]), documents


class _OpenRows:
    """Rows that are not full, by the room that is left in them."""

    def __init__(self, room: int) -> None:
        self._room, self._made = room, 0
        self._rows: dict[int, list[np.ndarray]] = {}
        self._lefts: list[int] = []  # keys of `_rows`, ascending

    def put(self, left: int, rows: np.ndarray) -> None:
        """Keeps rows with so much room left."""
        if left and rows.size:
            if left not in self._rows:
                bisect.insort(self._lefts, left)
            self._rows.setdefault(left, []).append(rows)

    def fullest(self, length: int, documents: int) -> tuple[int, np.ndarray]:
        """Takes out all rows with the least room in which `length` fits; else new ones, enough for so many documents."""
        index = bisect.bisect_left(self._lefts, length)
        if index < len(self._lefts):
            left = self._lefts.pop(index)
            return left, np.concatenate(self._rows.pop(left))
        count = -(-documents // (self._room // length))
        self._made += count
        return self._room, np.arange(self._made - count, self._made)
