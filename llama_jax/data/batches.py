"""Batches as a pure function of (seed, step): no state to save, no dependence on the number of
hosts.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.data.packing import Batch, Cut, Packing, select_sequences
from llama_jax.data.tokens import Tokens
from llama_jax.errors import InputError

# --- steps ---
#
# Which sequences of the endless data a step reads: skipped steps and a growing batch, in closed
# form.


Pairs = tuple[tuple[int, int], ...]


def joined(*parts: Pairs) -> Pairs:
    """Ranges `(first, last)`, in any order and overlapping, as those that `Steps` takes; what
    touches becomes one.
    """
    ranges: list[tuple[int, int]] = []
    for first, last in sorted(pair for part in parts for pair in part):
        if ranges and first <= ranges[-1][1] + 1:
            start, end = ranges.pop()
            first, last = start, max(last, end)
        ranges.append((first, last))
    return tuple(ranges)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The places of steps in the order of the data.

    The data are dealt out in data steps, counted from 0. Without skipped ones, step and data step
    are the same number; else step `k` reads the `k`-th data step that is not skipped. The size of a
    batch goes by the data step, so that leaving one out moves nothing else.

    Attributes:
      sequences: of a data step.
      ramp: `((step, sequences), ...)`: from that data step on so many sequences; steps ascend.
      skip: `((first, last), ...)`: data steps that are never used, both ends included; in ascending
        order, disjoint.

    Raises:
      InputError: for anything else.
    """

    sequences: int
    ramp: Pairs = ()
    skip: Pairs = ()

    def __post_init__(self) -> None:
        for name, pairs in (("batch_ramp", self.ramp), ("skip_steps", self.skip)):
            _require(
                _are_pairs(pairs),
                name,
                pairs,
                "pairs of whole numbers expected, as in [[100, 200]]",
            )
        starts, sizes = zip(*self._stages)
        grows = all(a < b for a, b in itertools.pairwise(starts)) and min(sizes) >= 1
        _require(
            grows,
            "batch_ramp",
            self.ramp,
            "at least 1 sequence and steps that ascend from 1 on expected",
        )
        ends = [-1, *(last for _, last in self.skip)]
        parted = all(end < first <= last for end, (first, last) in zip(ends, self.skip))
        _require(
            parted,
            "skip_steps",
            self.skip,
            "ranges [first, last] that ascend and do not overlap expected",
        )

    @property
    def _stages(self) -> Pairs:
        return ((0, self.sequences), *self.ramp)

    @property
    def most_sequences(self) -> int:
        """Rows of the largest batch."""
        return max(sequences for _, sequences in self._stages)

    def data_step(self, step: int) -> int:
        """The data step that a step reads."""
        for first, last in self.skip:
            if step >= first:
                step += last - first + 1
        return step

    def sequences_at(self, step: int) -> int:
        """Rows of the batch of a step."""
        data_step = self.data_step(step)
        return next(sequences for start, sequences in reversed(self._stages) if start <= data_step)

    def position(self, step: int) -> int:
        """Rows of the data, used or skipped, before those of a step."""
        return self._position(self.data_step(step))

    def used_before(self, step: int) -> int:
        """Rows that the steps before a step read."""
        end = self.data_step(step)
        skipped = (
            self._position(last + 1) - self._position(first)
            for first, last in self.skip
            if last < end
        )
        return self._position(end) - sum(skipped)

    def _position(self, data_step: int) -> int:
        ends = [*(start for start, _ in self.ramp), data_step]
        return sum(
            sequences * max(0, min(end, data_step) - start)
            for (start, sequences), end in zip(self._stages, ends)
        )


def _require(condition: bool, name: str, pairs: object, expected: str) -> None:
    if not condition:
        raise InputError(f"data.{name}: {pairs!r:.60} given, {expected}")


def _are_pairs(pairs: Sequence[Sequence[object]]) -> bool:
    return all(len(pair) == 2 and all(type(number) is int for number in pair) for pair in pairs)


# --- permutation ---
#
# A seeded permutation that is computed, not stored: the order in which windows are read.
#
# A balanced Feistel network is a bijection on 2^k numbers, whatever its round function; walking its
# cycles until a number below `count` comes up makes it one on `count` numbers (Black and Rogaway,
# "Ciphers with arbitrary finite domains", 2002). Integer arithmetic only, so the order is the same
# on every machine and with every version of numpy. It is part of a run's identity: changing it
# changes the data of a resumed training.


_ROUNDS = 8


def permute(indices: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Images of `indices` under the permutation of `0 .. count - 1` that belongs to `seed` and
    `epoch`.

    Args:
      indices: integers from 0 to `count - 1`, one axis.
      count: how many numbers are permuted.
      seed: of the run.
      epoch: number of the pass over the data, from 0.

    Returns:
      int64, the shape of `indices`.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    keys = _round_keys(seed, epoch)
    images = _feistel(indices.astype(np.uint64), half, keys)
    outside = np.flatnonzero(images >= count)
    while outside.size:
        images[outside] = _feistel(images[outside], half, keys)
        outside = outside[images[outside] >= count]
    return images.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(
        f"llama_jax order 1: {seed} {epoch}".encode(), digest_size=8 * _ROUNDS
    ).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every bit in reaches every bit
    out, modulo 2^64.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# --- batches ---


# Rows in which the proportions of a mixture are exact, and sequences that are put into an order of
# their own. Part of a run's identity, as is all of this file.
ROUND = 1_000_000
BLOCK = 1000
# of all that are prime to a thousand the one whose multiples are spread most evenly: to within 3.5
# sequences
_STRIDE = 367
_OFF = 0.01  # the largest relative error of a share
_MIXING = 1 << 62  # set in the seed of the order of sources, and of no source's own


class Source(NamedTuple):
    """One data set of a mixture.

    Attributes:
      packing: its sequences.
      weight: its share of the sequences, beside the weights of the others.
    """

    packing: Packing
    weight: float


@dataclasses.dataclass(frozen=True)
class Batches:
    """The training batches of one or several data sets, without end.

    Each set is read epoch after epoch, each epoch in an order of its own; one may end inside a
    batch. Of several sets, every 1,000,000 sequences (of pairs: pairs) hold the wanted share of
    each. Every 1,000, in an order of their own, do to within a few sequences; exactly where all
    shares are whole thousandths.

    Attributes:
      sources: the data sets of the mixture.
      steps: how many sequences each step has, and which it reads.
      seed: chooses the order.

    Raises:
      InputError: if a set has too few sequences for its part of a batch, or too little weight, or
        pairs are mixed with other data.
    """

    sources: tuple[Source, ...]
    steps: Steps
    seed: int

    def __post_init__(self) -> None:
        if not self.sources or {source.packing.unit for source in self.sources} not in ({1}, {2}):
            raise InputError(
                "sources: none, or pairs of answers beside other data; sets of one kind expected"
            )
        odd = [
            sequences
            for _, sequences in ((0, self.steps.sequences), *self.steps.ramp)
            if sequences % self.unit
        ]
        if odd:
            raise InputError(
                f"batch_size: {odd[0]} given, an even number expected: pairs of answers "
                "take two sequences each"
            )
        weights = [source.weight for source in self.sources]
        for source, share in zip(self.sources, round_shares(weights)):
            exact = ROUND * source.weight / sum(weights)
            if abs(share - exact) > _OFF * exact:
                raise InputError(
                    f"{source.packing.tokens.name}: weight {source.weight} is "
                    f"{exact:.3g} of {ROUND:,} sequences, {share} would be "
                    "more than 1 % off; raise it or leave the set out"
                )
            wanted = self.unit * -(-self.steps.most_sequences // self.unit * share // ROUND)
            if source.packing.count < wanted:
                raise InputError(_too_little(source, wanted))

    @property
    def unit(self) -> int:
        """Neighbouring sequences that stay together: 2 for pairs of answers, else 1."""
        return self.sources[0].packing.unit

    @property
    def length(self) -> int:
        """`T`, tokens of a sequence."""
        return self.sources[0].packing.length

    def sequences_at(self, step: int) -> int:
        """`B`, sequences of the global batch of a step."""
        return self.steps.sequences_at(step)

    def tokens_before(self, step: int) -> int:
        """Tokens, padding included, that were read when a step begins."""
        return self.steps.used_before(step) * self.length

    def batch(self, step: int) -> Batch:
        """The whole batch of a step, which counts from 0."""
        return self.sequences(step, 0, self.sequences_at(step))

    def sequences(self, step: int, start: int, stop: int) -> Batch:
        """Rows `start` to `stop - 1` of the batch of a step: the part that one host reads.

        Raises:
          InputError: a negative step, or sequences that the batch does not have.
        """
        most = self.sequences_at(max(step, 0))
        if step < 0 or not 0 <= start <= stop <= most:
            raise InputError(
                f"sequences {start} to {stop} of step {step} asked for, but a batch has "
                f"sequences 0 to {most}"
            )
        return self.chosen_sequences(step, np.arange(start, stop, dtype=np.int64))

    def chosen_sequences(self, step: int, numbers: np.ndarray) -> Batch:
        """Rows of the batch of a step by their numbers, in the order given."""
        units, inside = np.divmod(self.steps.position(step) + numbers, self.unit)
        of, places = self._mixed(units)
        parts, orders = [], []
        for number, (packing, _) in enumerate(self.sources):
            here = np.flatnonzero(of == number)
            if here.size:
                order = _epochs(places[here], packing.count // self.unit, self.seed | number << 32)
                parts.append(packing.sequences(order * self.unit + inside[here]))
                orders.append(here)
        if not parts:
            return self.sources[0].packing.sequences(numbers)
        return select_sequences(parts, np.argsort(np.concatenate(orders)))

    @property
    def shares(self) -> list[float]:
        """The share of the sequences that each source has, exact over every million of them."""
        return [share / ROUND for share in round_shares([source.weight for source in self.sources])]

    @functools.cached_property
    def _blocks(self) -> np.ndarray:
        return block_shares([source.weight for source in self.sources])

    def _mixed(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each unit of the data the number of its source, and its place in the endless sequence
        of that source.
        """
        if len(self.sources) == 1:
            return np.zeros_like(units), units
        blocks, places = np.divmod(units, BLOCK)
        slots = np.empty_like(places)
        for block in np.unique(blocks):
            here = blocks == block
            slots[here] = permute(places[here], BLOCK, self.seed | _MIXING, int(block))
        rounds, inside = np.divmod(blocks, len(self._blocks))
        ends = np.cumsum(self._blocks, axis=1)[inside]
        of = np.sum(slots[:, None] >= ends, axis=1)
        before = np.cumsum(self._blocks, axis=0) - self._blocks
        each = np.arange(len(units))
        first = ends[each, of] - self._blocks[inside, of]
        return of, rounds * self._blocks.sum(axis=0)[of] + before[inside, of] + slots - first


def round_shares(weights: list[float]) -> list[int]:
    """Sequences of each source in a million: proportional to its weight, the remainder by largest
    remainder.

    Raises:
      InputError: for a weight that is not above 0.
    """
    if min(weights) <= 0:
        raise InputError(f"weights: {min(weights)} given, numbers above 0 expected")
    exact = [ROUND * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(
        range(len(weights)), key=lambda number: (shares[number] - exact[number], number)
    )
    for number in by_remainder[: ROUND - sum(shares)]:
        shares[number] += 1
    return shares


def block_shares(weights: list[float]) -> np.ndarray:
    """Rows of each source in each block of a round, `[1000, sources]`: each sequence of it adds up
    to 1,000.

    A block has the whole thousandths of every share. What is over is dealt out to the blocks in
    strides, so that after any number of blocks every source is within 4 sequences of its share.

    Raises:
      InputError: for a weight that is not above 0.
    """
    whole, over = np.divmod(np.array(round_shares(weights)), ROUND // BLOCK)
    owners = np.repeat(np.arange(len(weights)), over)
    blocks = np.tile(whole, (ROUND // BLOCK, 1))
    np.add.at(blocks, (np.arange(len(owners)) * _STRIDE % (ROUND // BLOCK), owners), 1)
    return blocks


def sequential_windows(tokens: Tokens, length: int, batch_size: int) -> Iterator[Batch]:
    """The windows of some tokens in order, each once: every token that is learned from is a target
    of weight 1 once.

    First tokens of documents are not. A document that a window cuts continues in the next sequence
    without its past. What is missing in the last batch is padding, so all batches have one shape.
    Of text, the weights sum to tokens minus documents.

    Args:
      tokens: any.
      length: `T`, tokens of a sequence.
      batch_size: `B`, sequences of a batch.
    """
    if min(length, batch_size) < 1:
        raise InputError(f"length: {length}, batch_size: {batch_size}: at least 1 expected")
    packing, windows = Cut(tokens, length), -(-(tokens.size - 1) // length)
    for first in range(0, windows, batch_size):
        yield packing.sequences(np.arange(first, first + batch_size))


def sequential_sequences(packing: Packing, batch_size: int) -> Iterator[Batch]:
    """The sequences of a packing in order, each once; the rest of the last batch is
    padding.
    """
    for first in range(0, packing.count, batch_size):
        yield packing.sequences(np.arange(first, first + batch_size))


def _epochs(places: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Units of a source at places of its endless sequence, in which every epoch has its own
    order.
    """
    epochs, inside = np.divmod(places, count)
    order = np.empty_like(inside)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order[here] = permute(inside[here], count, seed, int(epoch))
    return order


def _too_little(source: Source, wanted: int) -> str:
    tokens, sequences = source.packing.tokens, source.packing.count
    return (
        f"{tokens.name}: {tokens.size} tokens are {sequences} sequences, but its part of "
        f"a batch needs {wanted}; lower batch_size or "
        "length, or give more text"
    )
