"""Which rows of the endless data a step reads: skipped steps and a growing batch, in closed form."""

import dataclasses
import itertools
from collections.abc import Sequence

from llama_jax.errors import InputError

Pairs = tuple[tuple[int, int], ...]


def joined(*parts: Pairs) -> Pairs:
    """Ranges `(first, last)`, in any order and overlapping, as those that `Steps` takes; what touches becomes one."""
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

    The data are dealt out in data steps, counted from 0. Without skipped ones, step and data step are the same number;
    else step `k` reads the `k`-th data step that is not skipped. The size of a batch goes by the data step, so that
    leaving one out moves nothing else.

    Attributes:
      rows: of a data step.
      ramp: `((step, rows), ...)`: from that data step on so many rows; steps ascend.
      skip: `((first, last), ...)`: data steps that are never used, both ends included; in ascending order, disjoint.

    Raises:
      InputError: for anything else.
    """

    rows: int
    ramp: Pairs = ()
    skip: Pairs = ()

    def __post_init__(self) -> None:
        for name, pairs in (("batch_ramp", self.ramp), ("skip_steps", self.skip)):
            _require(_are_pairs(pairs), name, pairs, "pairs of whole numbers expected, as in [[100, 200]]")
        starts, sizes = zip(*self._stages)
        grows = all(a < b for a, b in itertools.pairwise(starts)) and min(sizes) >= 1
        _require(grows, "batch_ramp", self.ramp, "at least 1 row and steps that ascend from 1 on expected")
        ends = [-1, *(last for _, last in self.skip)]
        parted = all(end < first <= last for end, (first, last) in zip(ends, self.skip))
        _require(parted, "skip_steps", self.skip, "ranges [first, last] that ascend and do not overlap expected")

    @property
    def _stages(self) -> Pairs:
        return ((0, self.rows), *self.ramp)

    @property
    def most_rows(self) -> int:
        """Rows of the largest batch."""
        return max(rows for _, rows in self._stages)

    def data_step(self, step: int) -> int:
        """The data step that a step reads."""
        for first, last in self.skip:
            if step >= first:
                step += last - first + 1
        return step

    def rows_at(self, step: int) -> int:
        """Rows of the batch of a step."""
        data_step = self.data_step(step)
        return next(rows for start, rows in reversed(self._stages) if start <= data_step)

    def position(self, step: int) -> int:
        """Rows of the data, used or skipped, before those of a step."""
        return self._position(self.data_step(step))

    def used_before(self, step: int) -> int:
        """Rows that the steps before a step read."""
        end = self.data_step(step)
        skipped = (self._position(last + 1) - self._position(first) for first, last in self.skip if last < end)
        return self._position(end) - sum(skipped)

    def _position(self, data_step: int) -> int:
        ends = [*(start for start, _ in self.ramp), data_step]
        return sum(rows * max(0, min(end, data_step) - start) for (start, rows), end in zip(self._stages, ends))


def _require(condition: bool, name: str, pairs: object, expected: str) -> None:
    if not condition:
        raise InputError(f"data.{name}: {pairs!r:.60} given, {expected}")


def _are_pairs(pairs: Sequence[Sequence[object]]) -> bool:
    return all(len(pair) == 2 and all(type(number) is int for number in pair) for pair in pairs)
