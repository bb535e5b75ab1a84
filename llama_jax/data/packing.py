"""Rows of a data set, numbered: its tokens cut into windows, its documents fitted whole into rows, or pairs of answers."""

from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from llama_jax.data.batch import Batch, empty_batch
from llama_jax.data.best_fit import best_fit
from llama_jax.data.tokens import Tokens
from llama_jax.errors import InputError

Name = Literal["cut", "fit"]


@runtime_checkable
class Packing(Protocol):
    """The rows of one pass over some tokens.

    Attributes:
      tokens: what is packed.
      length: `T`, tokens of a row.
      unit: neighbouring rows that stay together in any order: 2 for pairs of answers, else 1.
      count: rows in all, a multiple of `unit`.
    """

    tokens: Tokens
    length: int
    unit: int
    count: int

    def rows(self, numbers: Int64[Any, " B"]) -> Batch:
        """The rows of these numbers; a number beyond the last is a row of padding."""
        ...


class Cut:
    """The tokens as one long row, cut into windows of `length + 1` whose last token is the first of the next window.

    Over a pass every token is an input once and a target once. A last window that the tokens do not fill is not
    counted, but can be asked for.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens, self.length = tokens, length
        self.unit, self.count = 1, max(0, (tokens.size - 1) // length)

    def rows(self, numbers: np.ndarray) -> Batch:
        """Window `w` holds the tokens from `w * length` on; past the end there is padding."""
        batch = empty_batch(len(numbers), self.length)
        for row, first in enumerate((numbers * self.length).tolist()):
            ids, begins, learned = self.tokens.read(first, first + self.length + 1)
            inputs, targets = min(len(ids), self.length), max(0, len(ids) - 1)
            batch.tokens[row, :inputs] = ids[:inputs]
            batch.targets[row, :targets] = ids[1:]
            batch.weights[row, :targets] = learned[1:] & ~begins[1:]
            begins[:1] = True
            batch.documents[row, :inputs] = np.cumsum(begins[:inputs])
        return batch


class _Whole:
    """Rows of documents that are never continued in another row.

    A document of `n` tokens takes `n - 1` places: its last token is a target only. One that is longer than a row is cut
    at its end; one of a single token has no target and is left out.

    Attributes:
      tokens: what is packed.
      length: see `Packing`, as are the next two.
      unit: rows that stay together.
      count: rows in all.
      cut: documents that are longer than a row.
      places: that documents take up, of `count * length`.
    """

    def __init__(self, tokens: Tokens, length: int, unit: int) -> None:
        self.tokens, self.unit, self.length = tokens, unit, length
        lengths = tokens.lengths()
        self._firsts = np.cumsum(lengths) - lengths
        self._takes = np.minimum(lengths - 1, length)
        self.cut, self.places = int(np.count_nonzero(lengths - 1 > length)), int(self._takes.sum())
        row_of = self._assign()
        kept = np.flatnonzero(row_of >= 0)
        self._order = kept[np.argsort(row_of[kept], kind="stable")]  # documents by row, inside it by their number
        self.count = int(row_of.max(initial=-1)) + 1
        self._borders = np.searchsorted(row_of[self._order], np.arange(self.count + 1))

    def _assign(self) -> np.ndarray:
        """The row of each document; -1 for none."""
        raise NotImplementedError

    def rows(self, numbers: np.ndarray) -> Batch:
        """The rows of these numbers."""
        batch = empty_batch(len(numbers), self.length)
        for row, number in enumerate(numbers.tolist()):
            if number < self.count:
                self._fill(batch, row, self._order[self._borders[number] : self._borders[number + 1]])
        return batch

    def _fill(self, batch: Batch, row: int, documents: np.ndarray) -> None:
        at = 0
        for number, document in enumerate(documents.tolist(), 1):
            first, take = int(self._firsts[document]), int(self._takes[document])
            ids, _, learned = self.tokens.read(first, first + take + 1)
            batch.tokens[row, at : at + take] = ids[:-1]
            batch.targets[row, at : at + take] = ids[1:]
            batch.weights[row, at : at + take] = learned[1:]
            batch.documents[row, at : at + take] = number
            at += take


class Fit(_Whole):
    """Whole documents side by side in rows, by best fit."""

    def __init__(self, tokens: Tokens, length: int) -> None:
        super().__init__(tokens, length, unit=1)

    def _assign(self) -> np.ndarray:
        rows = np.full(len(self._takes), -1, np.int64)
        kept = self._takes > 0
        rows[kept] = best_fit(self._takes[kept], self.length)
        return rows


class Pairs(_Whole):
    """One answer a row: the chosen one of pair `i` in row `2i`, the rejected one in row `2i + 1`."""

    def __init__(self, tokens: Tokens, length: int) -> None:
        super().__init__(tokens, length, unit=2)

    def _assign(self) -> np.ndarray:
        return np.arange(len(self._takes))


def pack(tokens: Tokens, length: int, packing: Name) -> Packing:
    """The rows of a data set: pairs for pairs of answers, else packed as the name says.

    Raises:
      InputError: for a length below 1.
    """
    if length < 1:
        raise InputError(f"length: {length} given, at least 1 expected")
    if tokens.kind == "pairs":
        return Pairs(tokens, length)
    return Cut(tokens, length) if packing == "cut" else Fit(tokens, length)
