"""Batches as a pure function of (seed, step): no state to save, no dependence on the number of hosts.

Documents are packed: the token file is read as one long row, cut into windows of `length + 1` tokens whose last token
is the first of the next window, so that over an epoch every token is an input once and a target once.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from llama_jax.data.permutation import permute
from llama_jax.data.token_file import TokenFile
from llama_jax.errors import InputError


class Batch(NamedTuple):
    """Rows of packed documents.

    Attributes:
      tokens: inputs.
      targets: the token that follows each input in the token file.
      weights: 1 where the target counts; 0 where it begins another document, and on padding.
      documents: number of the input's document inside its row, from 1; 0 on padding. Equal numbers may attend.
    """

    tokens: Int32[Any, "B T"]
    targets: Int32[Any, "B T"]
    weights: Float32[Any, "B T"]
    documents: Int32[Any, "B T"]


@dataclasses.dataclass(frozen=True)
class PackedBatches:
    """The training batches of a token file, without end: epoch after epoch, each in an order of its own.

    A last window that the tokens do not fill is left out. An epoch may end inside a batch; the next one begins there.

    Attributes:
      token_file: the tokens.
      batch_rows: `B`, rows of the global batch.
      length: `T`, tokens of a row.
      seed: chooses the order.

    Raises:
      InputError: if the tokens do not fill one batch.
    """

    token_file: TokenFile
    batch_rows: int
    length: int
    seed: int

    def __post_init__(self) -> None:
        _require_positive(batch_rows=self.batch_rows, length=self.length)
        if self.windows < self.batch_rows:
            raise InputError(
                f"{self.token_file.path}: {self.token_file.header.tokens} tokens are {self.windows} windows of "
                f"{self.length} + 1, but a batch needs {self.batch_rows}; lower batch_rows or length, or give more text"
            )

    @property
    def windows(self) -> int:
        """Windows in one epoch."""
        return (self.token_file.header.tokens - 1) // self.length

    def batch(self, step: int) -> Batch:
        """The whole batch of a step, which counts from 0."""
        return self.rows(step, 0, self.batch_rows)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows `start` to `stop - 1` of the batch of a step: the part that one host reads.

        Raises:
          InputError: a negative step, or rows that the batch does not have.
        """
        if step < 0 or not 0 <= start <= stop <= self.batch_rows:
            raise InputError(f"rows {start} to {stop} of step {step} asked for, but a batch has rows 0 to {self.batch_rows}")
        epochs, places = np.divmod(step * self.batch_rows + np.arange(start, stop, dtype=np.int64), self.windows)
        order = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order[here] = permute(places[here], self.windows, self.seed, int(epoch))
        return _cut_windows(self.token_file, order, self.length)


def sequential_windows(token_file: TokenFile, length: int, batch_rows: int) -> Iterator[Batch]:
    """The windows of a token file in order, each once: every token is a target of weight 1 once, but for first tokens.

    A document that a window cuts goes on in the next row without its past. What is missing in the last batch is
    padding, so all batches have one shape. The weights sum to tokens minus documents.

    Args:
      token_file: the tokens.
      length: `T`, tokens of a row.
      batch_rows: `B`, rows of a batch.
    """
    _require_positive(batch_rows=batch_rows, length=length)
    windows = -(-(token_file.header.tokens - 1) // length)
    for first in range(0, windows, batch_rows):
        yield _cut_windows(token_file, np.arange(first, first + batch_rows), length)


def fingerprint(batch: Batch) -> str:
    """SHA-256, in hexadecimal, of a batch's shape and content: equal on all machines if and only if the batch is."""
    digest = hashlib.sha256(repr(batch.tokens.shape).encode())
    for values in batch:
        digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _require_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name}: {value} given, at least 1 expected")


def _cut_windows(token_file: TokenFile, windows: np.ndarray, length: int) -> Batch:
    """Window `w` holds the tokens from `w * length` on; past the end of the file there is padding."""
    ids = np.zeros((len(windows), length + 1), np.int32)
    documents = np.zeros_like(ids)
    for row, first in enumerate((windows * length).tolist()):
        piece = token_file.tokens[first : first + length + 1]
        ids[row, : len(piece)] = piece
        documents[row, : len(piece)] = _document_numbers(token_file.starts, first, len(piece))
    same = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] > 0)
    return Batch(ids[:, :-1], ids[:, 1:], same.astype(np.float32), documents[:, :-1])


def _document_numbers(starts: np.ndarray, first: int, count: int) -> np.ndarray:
    """Documents of the tokens from `first` to `first + count - 1`, numbered from 1."""
    # Keys of the array's own type: any other would have the whole mapped array converted for each look-up.
    begin, end = np.searchsorted(starts, np.array([first, first + count], np.uint64))
    changes = np.zeros(count, np.int32)
    changes[:1] = 1
    changes[(starts[begin:end] - np.uint64(first)).astype(np.int64)] = 1
    return np.cumsum(changes, dtype=np.int32)
