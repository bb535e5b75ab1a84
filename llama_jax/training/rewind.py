"""Going back: to a checkpoint from before too many steps were skipped, and on without the data that they had read.

What was gone back from is kept in `RUN/rewinds.json`. It is written before anything is removed, and checkpoints say how many
times the run had gone back when they were made, so a run that is killed in the middle goes on where it was sent.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from llama_jax.axes import PyTree
from llama_jax.data.atomic import atomic_write
from llama_jax.data.steps import Pairs, joined
from llama_jax.errors import CorruptError
from llama_jax.training.watch import Trouble, ranges

RUN_REWINDS = "rewinds.json"  # in the directory of a run
MADE_AFTER = "rewinds"  # in the metadata of a checkpoint: times that the run had gone back before


class Rewind(NamedTuple):
    """One time that a run went back.

    Attributes:
      to: updates that the state has which it went back to.
      reason: in words.
      steps: which steps had gone wrong, from 0.
      data: the data steps that they had read, which are left out from then on.
    """

    to: int
    reason: str
    steps: Pairs
    data: Pairs


class Rewinds:
    """All times that a run went back, kept in its directory.

    Args:
      directory: of the run.

    Raises:
      CorruptError: if what is written there makes no sense.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / RUN_REWINDS
        self.done = _read(self._path)

    @property
    def skip(self) -> Pairs:
        """Data steps that are left out."""
        return joined(*[rewind.data for rewind in self.done])

    @property
    def since(self) -> int:
        """Steps before this one that were skipped count no more."""
        return self.done[-1].to if self.done else 0

    def times(self, to: int) -> int:
        """How often the run went back to a step."""
        return sum(rewind.to == to for rewind in self.done)

    def add(self, rewind: Rewind) -> None:
        """Keeps another one, at once and for good."""
        self.done = (*self.done, rewind)
        if jax.process_index() == 0:
            with atomic_write(self._path) as file:
                file.write(json.dumps([one._asdict() for one in self.done], indent=1).encode())

    def left_behind(self, saved: Mapping[int, dict]) -> list[int]:
        """Checkpoints that the run has gone back behind since they were made.

        Args:
          saved: the metadata of checkpoints, by step.
        """
        return [step for step, metadata in saved.items() if self._left(step, metadata.get(MADE_AFTER, 0))]

    def _left(self, step: int, made_after: int) -> bool:
        """Whether that is so for a checkpoint that was made after so many times."""
        return any(step > rewind.to for rewind in self.done[made_after:])


def _read(path: Path) -> tuple[Rewind, ...]:
    if not path.exists():
        return ()
    try:
        entries = json.loads(path.read_bytes())
        return tuple(Rewind(int(one["to"]), str(one["reason"]), _pairs(one["steps"]), _pairs(one["data"])) for one in entries)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"{path}: not what a run writes there ({error!r}); bring back a copy, or start anew") from None


def _pairs(values: Sequence[Sequence[int]]) -> Pairs:
    return tuple((int(first), int(last)) for first, last in values)


def plan_rewind(trouble: Trouble, saved: Sequence[int], data_step: Callable[[int], int]) -> Rewind:
    """Where to go back to, and what to leave out.

    The newest checkpoint from before all steps of the trouble; where none is left, from before the last of them; where there is
    none at all, the beginning.

    Args:
      trouble: skipped steps.
      saved: steps of the checkpoints; none was made after the last step of the trouble.
      data_step: which data a step has read.
    """
    numbers = [one.step for one in trouble.steps]
    before = [step for step in saved if step <= numbers[0]] or [step for step in saved if step <= numbers[-1]]
    to = max(before) if saved else 0
    wrong = [number for number in numbers if number >= to]
    return Rewind(to, trouble.reason, ranges(wrong), ranges([data_step(number) for number in wrong]))


def let_go(state: PyTree) -> None:
    """Frees the memory of arrays at once, before others take their place."""
    for leaf in jax.tree.leaves(state):
        leaf.delete()
