"""Rows of a data set, numbered: its tokens cut into windows, its documents fitted whole into
sequences, or pairs of answers.
"""

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64

from llama_jax.data.tokens import Tokens
from llama_jax.errors import InputError

# --- best fit ---
#
# Packing whole documents into sequences: best fit, the longest first.


def best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """The sequence of each document: the fullest one that still has room for it, a new one where
    none has.

    The longest are placed first. Documents of one length are placed together: the fullest sequence
    with room for one stays the fullest, so it takes as many as fit, and sequences with the same
    room left take as many each. A million documents thus take as many steps as there are different
    lengths, a few times over.

    Args:
      lengths: of the documents, from 1 to `room`.
      room: of a sequence.

    Returns:
      int64, a sequence number from 0 for each document; every number up to the largest is used.
    """
    sequences, open_sequences = np.empty(len(lengths), np.int64), _OpenRows(room)
    for length, documents in _longest_first(lengths):
        placed = 0
        while placed < len(documents):
            left, candidates = open_sequences.fullest(length, len(documents) - placed)
            each = left // length
            whole = min(len(candidates), (len(documents) - placed) // each)
            sequences[documents[placed : placed + whole * each]] = np.repeat(
                candidates[:whole], each
            )
            open_sequences.put(left - each * length, candidates[:whole])
            placed += whole * each
            rest = candidates[whole:]
            if rest.size and placed < len(documents):
                sequences[documents[placed:]] = rest[0]
                open_sequences.put(left - (len(documents) - placed) * length, rest[:1])
                placed, rest = len(documents), rest[1:]
            open_sequences.put(left, rest)
    return sequences


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
        self._sequences: dict[int, list[np.ndarray]] = {}
        self._lefts: list[int] = []  # keys of `_sequences`, ascending

    def put(self, left: int, sequences: np.ndarray) -> None:
        """Keeps sequences with this much room left."""
        if left and sequences.size:
            if left not in self._sequences:
                bisect.insort(self._lefts, left)
            self._sequences.setdefault(left, []).append(sequences)

    def fullest(self, length: int, documents: int) -> tuple[int, np.ndarray]:
        """Takes out all sequences with the least room in which `length` fits; else new ones, enough
        for this many documents.
        """
        index = bisect.bisect_left(self._lefts, length)
        if index < len(self._lefts):
            left = self._lefts.pop(index)
            return left, np.concatenate(self._sequences.pop(left))
        count = -(-documents // (self._room // length))
        self._made += count
        return self._room, np.arange(self._made - count, self._made)


# --- batch ---
#
# What a model is trained on in one step.


class Batch(NamedTuple):
    """Rows of packed documents.

    Attributes:
      tokens: inputs.
      targets: the token that follows each input in its document.
      weights: 1 where the target counts; 0 where it begins another document, is not to be learned,
        and on padding.
      documents: number of the input's document inside its sequence, from 1; 0 on padding. Equal
        numbers may attend.
    """

    tokens: Int32[Any, "B T"]
    targets: Int32[Any, "B T"]
    weights: Float32[Any, "B T"]
    documents: Int32[Any, "B T"]


def empty_batch(sequences: int, length: int) -> Batch:
    """Rows of padding, to be filled."""
    tokens, targets, documents = (np.zeros((sequences, length), np.int32) for _ in range(3))
    return Batch(tokens, targets, np.zeros((sequences, length), np.float32), documents)


def select_sequences(batches: Sequence[Batch], order: np.ndarray) -> Batch:
    """The sequences of several batches, put after one another and then taken in an order."""
    return Batch(*[np.concatenate(fields)[order] for fields in zip(*batches)])


def fingerprint(batch: Batch) -> str:
    """SHA-256, in hexadecimal, of a batch's shape and content: equal on all machines if and only if
    the batch is.
    """
    digest = hashlib.sha256(repr(batch.tokens.shape).encode())
    for values in batch:
        digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


# --- packing ---


Name = Literal["auto", "cut", "fit"]
TooLong = Literal["auto", "drop", "cut_front", "cut_end", "refuse"]
_WINDOWS_AT_ONCE = 1 << 20  # tokens


class Counts(NamedTuple):
    """What became of the documents of a data set.

    Attributes:
      documents: in all (of pairs: answers).
      too_long: of more tokens than fit into a sequence.
      dropped: of these, left out (of pairs: with the other answer).
      masked: of these, left out because the rest of them holds nothing to learn.
    """

    documents: int
    too_long: int = 0
    dropped: int = 0
    masked: int = 0


@runtime_checkable
class Packing(Protocol):
    """The sequences of one pass over some tokens.

    Attributes:
      tokens: to pack.
      length: `T`, tokens of a sequence.
      unit: neighbouring sequences that stay together in any order: 2 for pairs of answers, else 1.
      count: sequences in all, a multiple of `unit`.
      counts: what became of the documents.
    """

    tokens: Tokens
    length: int
    unit: int
    count: int
    counts: Counts

    def sequences(self, numbers: Int64[Any, " B"]) -> Batch:
        """The sequences of these numbers; a number beyond the last is a sequence of padding."""
        ...


class Cut:
    """The tokens as one long sequence, cut into windows of `length + 1` whose last token is the
    first of the next window.

    Over a pass every token is an input once and a target once. A last window that the tokens do not
    fill is not counted, but can be asked for.
    """

    def __init__(self, tokens: Tokens, length: int) -> None:
        self.tokens, self.length = tokens, length
        self.unit, self.count = 1, max(0, (tokens.size - 1) // length)
        self.counts = Counts(tokens.documents)

    def without_targets(self) -> int:
        """Rows in which nothing is learned from; reads everything, but of plain text, which has
        none.
        """
        if self.tokens.kind == "text":
            return 0
        found, many = 0, max(1, _WINDOWS_AT_ONCE // self.length)
        for first in range(0, self.count, many):
            last = min(first + many, self.count)
            _, begins, learned = self.tokens.read(first * self.length, last * self.length + 1)
            targets = (learned[1:] & ~begins[1:]).reshape(last - first, self.length)
            found += int(np.count_nonzero(~targets.any(axis=1)))
        return found

    def sequences(self, numbers: np.ndarray) -> Batch:
        """Window `w` holds the tokens from `w * length` on; past the end there is padding."""
        batch = empty_batch(len(numbers), self.length)
        for sequence, first in enumerate((numbers * self.length).tolist()):
            ids, begins, learned = self.tokens.read(first, first + self.length + 1)
            inputs, targets = min(len(ids), self.length), max(0, len(ids) - 1)
            batch.tokens[sequence, :inputs] = ids[:inputs]
            batch.targets[sequence, :targets] = ids[1:]
            batch.weights[sequence, :targets] = learned[1:] & ~begins[1:]
            begins[:1] = True
            batch.documents[sequence, :inputs] = np.cumsum(begins[:inputs])
        return batch


class _Whole:
    """Rows of documents that are never continued in another sequence.

    A document of `n` tokens takes `n - 1` places: its last token is a target only. One of a single
    token has no target and is left out. Of one that is longer than a sequence, `too_long` says what
      happens: it is dropped, loses tokens at its front
    (the prompt, where answers are last) or at its end, or is refused. One that is cut and has no
    target left is left out, and of pairs the other answer too: every sequence has something to
    learn.

    Attributes:
      tokens: to pack.
      length: see `Packing`, as are the next three.
      unit: sequences that stay together.
      count: sequences in all.
      counts: what became of the documents.
      places: that documents take up, of `count * length`.
    """

    def __init__(self, tokens: Tokens, length: int, unit: int, too_long: TooLong) -> None:
        self.tokens, self.unit, self.length = tokens, unit, length
        lengths = tokens.lengths()
        over = lengths - 1 > length
        if too_long == "refuse" and over.any():
            raise InputError(
                f"{tokens.name}: {np.count_nonzero(over):,} of {len(lengths):,} "
                f"documents have more than {length} tokens "
                f"(the longest {lengths.max():,}); raise data.length, or set "
                "data.too_long to drop, cut_front or cut_end"
            )
        self._takes = np.minimum(lengths - 1, length)
        self._firsts = np.cumsum(lengths) - lengths
        if too_long == "cut_front":
            self._firsts += lengths - 1 - self._takes
        masked = 0
        if too_long == "drop":
            self._takes[over] = 0
        elif tokens.kind != "text":
            empty = [
                document
                for document in np.flatnonzero(over).tolist()
                if not self._targets(document).any()
            ]
            self._takes[empty], masked = 0, len(empty)
        if unit > 1:
            self._takes.reshape(-1, unit)[(self._takes.reshape(-1, unit) == 0).any(axis=1)] = 0
        dropped = int(np.count_nonzero((lengths > 1) & (self._takes == 0))) - masked
        self.counts = Counts(len(lengths), int(np.count_nonzero(over)), dropped, masked)
        self.places = int(self._takes.sum())
        sequence_of = self._assign()
        kept = np.flatnonzero(sequence_of >= 0)
        self._order = kept[
            np.argsort(sequence_of[kept], kind="stable")
        ]  # documents by sequence, inside it by their number
        self.count = int(sequence_of.max(initial=-1)) + 1
        self._borders = np.searchsorted(sequence_of[self._order], np.arange(self.count + 1))

    def _targets(self, document: int) -> np.ndarray:
        """Which targets of a document are learned from."""
        first = int(self._firsts[document])
        return self.tokens.read(first, first + int(self._takes[document]) + 1).learned[1:]

    def _assign(self) -> np.ndarray:
        """The sequence of each document; -1 for none."""
        raise NotImplementedError

    def sequences(self, numbers: np.ndarray) -> Batch:
        """The sequences of these numbers."""
        batch = empty_batch(len(numbers), self.length)
        for sequence, number in enumerate(numbers.tolist()):
            if number < self.count:
                self._fill(
                    batch, sequence, self._order[self._borders[number] : self._borders[number + 1]]
                )
        return batch

    def _fill(self, batch: Batch, sequence: int, documents: np.ndarray) -> None:
        at = 0
        for number, document in enumerate(documents.tolist(), 1):
            first, take = int(self._firsts[document]), int(self._takes[document])
            ids, _, learned = self.tokens.read(first, first + take + 1)
            batch.tokens[sequence, at : at + take] = ids[:-1]
            batch.targets[sequence, at : at + take] = ids[1:]
            batch.weights[sequence, at : at + take] = learned[1:]
            batch.documents[sequence, at : at + take] = number
            at += take


class Fit(_Whole):
    """Whole documents side by side in sequences, by best fit."""

    def __init__(self, tokens: Tokens, length: int, too_long: TooLong) -> None:
        super().__init__(tokens, length, 1, too_long)

    def _assign(self) -> np.ndarray:
        sequences = np.full(len(self._takes), -1, np.int64)
        kept = self._takes > 0
        sequences[kept] = best_fit(self._takes[kept], self.length)
        return sequences


class Pairs(_Whole):
    """One answer a sequence: the chosen one of the `i`-th pair that is kept in sequence `2i`, the
    rejected one in sequence `2i + 1`.
    """

    def __init__(self, tokens: Tokens, length: int, too_long: TooLong) -> None:
        super().__init__(tokens, length, 2, too_long)

    def _assign(self) -> np.ndarray:
        kept = self._takes > 0
        return np.where(kept, np.cumsum(kept) - 1, -1)


def pack(tokens: Tokens, length: int, packing: Name, too_long: TooLong = "auto") -> Packing:
    """The sequences of a data set.

    Args:
      tokens: of any kind; pairs of answers have a sequence each, whatever the packing.
      length: `T`, tokens of a sequence.
      packing: `cut` or `fit`; `auto` cuts text and fits conversations.
      too_long: what happens to whole documents that are longer than a sequence; `auto` cuts text at
        its end, and drops conversations and pairs. Text and conversations that are cut into
        sequences (`cut`) have none.

    Raises:
      InputError: for a length below 1, and documents that are too long where that is refused.
    """
    if length < 1:
        raise InputError(f"length: {length} given, at least 1 expected")
    if too_long == "auto":
        too_long = "cut_end" if tokens.kind == "text" else "drop"
    if tokens.kind == "pairs":
        return Pairs(tokens, length, too_long)
    return (
        Cut(tokens, length)
        if packing_of(tokens.kind, packing) == "cut"
        else Fit(tokens, length, too_long)
    )


def packing_of(kind: str, packing: Name) -> Literal["cut", "fit"]:
    """The packing of data of a kind, `auto` resolved."""
    if packing == "auto":
        return "fit" if kind == "chat" else "cut"
    return packing
