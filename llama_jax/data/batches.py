"""Batches as a pure function of (seed, step): no state to save, no dependence on the number of hosts."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from llama_jax.data.batch import Batch, select_rows
from llama_jax.data.packing import Cut, Packing
from llama_jax.data.permutation import permute
from llama_jax.data.steps import Steps
from llama_jax.data.tokens import Tokens
from llama_jax.errors import InputError

# Rows in which the proportions of a mixture are exact, and rows that are put into an order of their own. Part of a run's
# identity, as is all of this file.
ROUND = 1_000_000
BLOCK = 1000
_STRIDE = 367  # of all that are prime to a thousand the one whose multiples are spread most evenly: to within 3.5 rows
_OFF = 0.01  # the largest relative error of a share
_MIXING = 1 << 62  # set in the seed of the order of sources, and of no source's own


class Source(NamedTuple):
    """One data set of a mixture.

    Attributes:
      packing: its rows.
      weight: its share of the rows, beside the weights of the others.
    """

    packing: Packing
    weight: float


@dataclasses.dataclass(frozen=True)
class Batches:
    """The training batches of one or several data sets, without end.

    Each set is read epoch after epoch, each epoch in an order of its own; one may end inside a batch. Of several sets,
    every 1,000,000 rows (of pairs: pairs) hold the wanted share of each. Every 1,000, in an order of their own, do to within a
    few rows; exactly where all shares are whole thousandths.

    Attributes:
      sources: what is mixed.
      steps: how many rows each step has, and which it reads.
      seed: chooses the order.

    Raises:
      InputError: if a set has too few rows for its part of a batch, or too little weight, or pairs are mixed with other data.
    """

    sources: tuple[Source, ...]
    steps: Steps
    seed: int

    def __post_init__(self) -> None:
        if not self.sources or {source.packing.unit for source in self.sources} not in ({1}, {2}):
            raise InputError("sources: none, or pairs of answers beside other data; sets of one kind expected")
        odd = [rows for _, rows in ((0, self.steps.rows), *self.steps.ramp) if rows % self.unit]
        if odd:
            raise InputError(f"batch_rows: {odd[0]} given, an even number expected: pairs of answers take two rows each")
        weights = [source.weight for source in self.sources]
        for source, share in zip(self.sources, round_shares(weights)):
            exact = ROUND * source.weight / sum(weights)
            if abs(share - exact) > _OFF * exact:
                raise InputError(
                    f"{source.packing.tokens.name}: weight {source.weight} is {exact:.3g} of {ROUND:,} rows, {share} would be "
                    "more than 1 % off; raise it or leave the set out"
                )
            wanted = self.unit * -(-self.steps.most_rows // self.unit * share // ROUND)
            if source.packing.count < wanted:
                raise InputError(_too_little(source, wanted))

    @property
    def unit(self) -> int:
        """Neighbouring rows that stay together: 2 for pairs of answers, else 1."""
        return self.sources[0].packing.unit

    @property
    def length(self) -> int:
        """`T`, tokens of a row."""
        return self.sources[0].packing.length

    def rows_at(self, step: int) -> int:
        """`B`, rows of the global batch of a step."""
        return self.steps.rows_at(step)

    def tokens_before(self, step: int) -> int:
        """Tokens, padding included, that were read when a step begins."""
        return self.steps.used_before(step) * self.length

    def batch(self, step: int) -> Batch:
        """The whole batch of a step, which counts from 0."""
        return self.rows(step, 0, self.rows_at(step))

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows `start` to `stop - 1` of the batch of a step: the part that one host reads.

        Raises:
          InputError: a negative step, or rows that the batch does not have.
        """
        most = self.rows_at(max(step, 0))
        if step < 0 or not 0 <= start <= stop <= most:
            raise InputError(f"rows {start} to {stop} of step {step} asked for, but a batch has rows 0 to {most}")
        return self.chosen_rows(step, np.arange(start, stop, dtype=np.int64))

    def chosen_rows(self, step: int, numbers: np.ndarray) -> Batch:
        """Rows of the batch of a step by their numbers, in the order given."""
        units, inside = np.divmod(self.steps.position(step) + numbers, self.unit)
        of, places = self._mixed(units)
        parts, orders = [], []
        for number, (packing, _) in enumerate(self.sources):
            here = np.flatnonzero(of == number)
            if here.size:
                order = _epochs(places[here], packing.count // self.unit, self.seed | number << 32)
                parts.append(packing.rows(order * self.unit + inside[here]))
                orders.append(here)
        if not parts:
            return self.sources[0].packing.rows(numbers)
        return select_rows(parts, np.argsort(np.concatenate(orders)))

    @property
    def shares(self) -> list[float]:
        """The share of the rows that each source has, exact over every million of them."""
        return [share / ROUND for share in round_shares([source.weight for source in self.sources])]

    @functools.cached_property
    def _blocks(self) -> np.ndarray:
        return block_shares([source.weight for source in self.sources])

    def _mixed(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each unit of the data the number of its source, and its place in the endless row of that source."""
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
    """Rows of each source in a million: proportional to its weight, what is left over by largest remainder.

    Raises:
      InputError: for a weight that is not above 0.
    """
    if min(weights) <= 0:
        raise InputError(f"weights: {min(weights)} given, numbers above 0 expected")
    exact = [ROUND * weight / sum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda number: (shares[number] - exact[number], number))
    for number in by_remainder[: ROUND - sum(shares)]:
        shares[number] += 1
    return shares


def block_shares(weights: list[float]) -> np.ndarray:
    """Rows of each source in each block of a round, `[1000, sources]`: each row of it adds up to 1,000.

    A block has the whole thousandths of every share. What is over is dealt out to the blocks in strides, so that after any
    number of blocks every source is within 4 rows of its share.

    Raises:
      InputError: for a weight that is not above 0.
    """
    whole, over = np.divmod(np.array(round_shares(weights)), ROUND // BLOCK)
    owners = np.repeat(np.arange(len(weights)), over)
    blocks = np.tile(whole, (ROUND // BLOCK, 1))
    np.add.at(blocks, (np.arange(len(owners)) * _STRIDE % (ROUND // BLOCK), owners), 1)
    return blocks


def sequential_windows(tokens: Tokens, length: int, batch_rows: int) -> Iterator[Batch]:
    """The windows of some tokens in order, each once: every token that is learned from is a target of weight 1 once.

    First tokens of documents are not. A document that a window cuts goes on in the next row without its past. What is
    missing in the last batch is padding, so all batches have one shape. Of text, the weights sum to tokens minus documents.

    Args:
      tokens: any.
      length: `T`, tokens of a row.
      batch_rows: `B`, rows of a batch.
    """
    if min(length, batch_rows) < 1:
        raise InputError(f"length: {length}, batch_rows: {batch_rows}: at least 1 expected")
    packing, windows = Cut(tokens, length), -(-(tokens.size - 1) // length)
    for first in range(0, windows, batch_rows):
        yield packing.rows(np.arange(first, first + batch_rows))


def sequential_rows(packing: Packing, batch_rows: int) -> Iterator[Batch]:
    """The rows of a packing in order, each once; what is missing in the last batch is padding."""
    for first in range(0, packing.count, batch_rows):
        yield packing.rows(np.arange(first, first + batch_rows))


def _epochs(places: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Units of a source at places of its endless row, in which every epoch has its own order."""
    epochs, inside = np.divmod(places, count)
    order = np.empty_like(inside)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order[here] = permute(inside[here], count, seed, int(epoch))
    return order


def _too_little(source: Source, wanted: int) -> str:
    tokens, rows = source.packing.tokens, source.packing.count
    return (
        f"{tokens.name}: {tokens.size} tokens are {rows} rows, but its part of a batch needs {wanted}; lower batch_rows or "
        "length, or give more text"
    )
