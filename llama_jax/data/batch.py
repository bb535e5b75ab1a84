"""What a model is trained on in one step."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32


class Batch(NamedTuple):
    """Rows of packed documents.

    Attributes:
      tokens: inputs.
      targets: the token that follows each input in its document.
      weights: 1 where the target counts; 0 where it begins another document, is not to be learned, and on padding.
      documents: number of the input's document inside its row, from 1; 0 on padding. Equal numbers may attend.
    """

    tokens: Int32[Any, "B T"]
    targets: Int32[Any, "B T"]
    weights: Float32[Any, "B T"]
    documents: Int32[Any, "B T"]


def empty_batch(rows: int, length: int) -> Batch:
    """Rows of padding, to be filled."""
    tokens, targets, documents = (np.zeros((rows, length), np.int32) for _ in range(3))
    return Batch(tokens, targets, np.zeros((rows, length), np.float32), documents)


def select_rows(batches: Sequence[Batch], order: np.ndarray) -> Batch:
    """The rows of several batches, put after one another and then taken in an order."""
    return Batch(*[np.concatenate(fields)[order] for fields in zip(*batches)])


def fingerprint(batch: Batch) -> str:
    """SHA-256, in hexadecimal, of a batch's shape and content: equal on all machines if and only if the batch is."""
    digest = hashlib.sha256(repr(batch.tokens.shape).encode())
    for values in batch:
        digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
