"""When the state of a run is saved, and what becomes of a save that fails: it is told, and tried again."""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from llama_jax.training.guard import all_finite
from llama_jax.training.step import TrainState
from llama_jax.weights.checkpoint import Checkpoints, SaveError

_ROOM = 2.2  # free space that is asked for, in sizes of a state: the old checkpoint goes only when the new one is there


class Saver:
    """The saves of one run. A failing disk costs checkpoints, not the run.

    Args:
      checkpoints: of the run.
      directory: that lies on the disk which they are written to.
      every: steps between two saves.
      metadata: gives what a checkpoint is to say of the run.
      tell: takes one line of text.

    Attributes:
      failures: saves that failed.
    """

    def __init__(
        self, checkpoints: Checkpoints, directory: Path, every: int, metadata: Callable[[], dict], tell: Callable[[str], None]
    ) -> None:
        self._checkpoints, self._directory, self._every, self._metadata = checkpoints, directory, every, metadata
        self._tell = tell
        self._looked = False  # at the room on the disk
        self._running = False  # whether a save has begun of which no failure is known
        # Other hosts may not know of a failure, and a save is made by all or by none: they wait for the next that is due.
        self._alone = jax.process_count() == 1
        self._in_a_row = 0  # failures since the last save that went well
        self._again: int | None = None  # the step after which a save that failed is tried again
        self.failures = 0

    def due(self, step: int) -> bool:
        """Whether the state after a step is to be saved; to be asked after every step, as it finds out what has failed."""
        self._attempt(step, self._checkpoints.poll)
        return step % self._every == 0 or (self._again is not None and step >= self._again)

    def save(self, step: int, state: TrainState) -> None:
        """Begins to save the state after a step, if its parameters are finite."""
        if not all_finite(state.params):
            self._tell(f"warning: checkpoint {step} was not written: its parameters are not finite")
            return
        if not self._looked:
            self._look(state)
        if self._running:  # and so has ended well
            self._in_a_row = 0
        if self._attempt(step, lambda: self._checkpoints.save(step, state, self._metadata())):
            self._running, self._again = True, None

    def go_back(self) -> None:
        """Forgets what was to be tried again: the run has gone back to a checkpoint."""
        self._again = None

    def wait(self, step: int) -> None:
        """Waits for a save that is under way."""
        self._attempt(step, self._checkpoints.wait)

    def finish(self, step: int, state: TrainState) -> None:
        """Waits for the last save, and tries it once more should it have failed."""
        self.wait(step)
        if self._again is not None and step not in self._checkpoints.steps():
            self.save(step, state)
            self.wait(step)

    def _attempt(self, step: int, action: Callable[[], None]) -> bool:
        """Does something with checkpoints; a failure is told, and a save becomes due again."""
        try:
            action()
        except SaveError as error:
            self._running = False
            self.failures += 1
            self._in_a_row += 1
            # After 1, 2, 4, ... steps: what is full stays full for a while, and a save that fails costs time too.
            self._again = step + 2 ** min(self._in_a_row - 1, 20) if self._alone else None
            times = f" ({self._in_a_row} in a row)" if self._in_a_row > 1 else ""
            self._tell(f"warning: {error}{times}")
            return False
        return True

    def _look(self, state: TrainState) -> None:
        """Warns of a disk that has too little room for checkpoints; once, before the first."""
        self._looked = True
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._directory).free
        if free < _ROOM * size:
            self._tell(f"warning: {self._directory}: {free / 1e9:.2f} GB free, a checkpoint has {size / 1e9:.2f} GB; at least "
                       f"{_ROOM * size / 1e9:.2f} GB expected; make room")  # fmt: skip
