"""What a run does about steps that go wrong again and again: it goes back and leaves out their data, or gives up."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from llama_jax.data.batches import Batches
from llama_jax.data.steps import Pairs, Steps, joined
from llama_jax.errors import CorruptError, DivergedError
from llama_jax.training.config_method import GuardConfig
from llama_jax.training.postmortem import ArrayFigures, usual, write_postmortem
from llama_jax.training.rewind import MADE_AFTER, Rewind, Rewinds, plan_rewind
from llama_jax.training.step import StepMetrics, TrainState
from llama_jax.training.watch import Trouble, Watch, figures_in_words, in_words
from llama_jax.weights.checkpoint import Checkpoints


class Recovery:
    """The watch over a run, and its ways back. `begin` comes before everything else, again after `go_back`."""

    def __init__(
        self, config: GuardConfig, skip: Pairs, directory: Path, checkpoints: Checkpoints, say: Callable[[str], None]
    ) -> None:
        """Takes up what the run has gone back from before, and ends what a crash has interrupted in it.

        Args:
          config: what is too much.
          skip: data steps that are left out anyway.
          directory: of the run.
          checkpoints: of the run.
          say: takes one line of text.

        Raises:
          CorruptError: if what the run has written down about it makes no sense.
        """
        self._config, self._skip, self._directory, self._say = config, skip, directory, say
        self._checkpoints, self._rewinds = checkpoints, Rewinds(directory)
        self._watch: Watch
        saved = {}
        for step in checkpoints.steps():
            with contextlib.suppress(CorruptError):  # a damaged one is for whoever restores to tell of
                saved[step] = checkpoints.metadata(step)
        checkpoints.discard(self._rewinds.left_behind(saved))

    @property
    def skipped(self) -> int:
        """Steps skipped since the start of the run."""
        return self._watch.skipped

    @property
    def streak(self) -> int:
        """Skipped steps in a row, up to now."""
        return self._watch.streak

    @property
    def count(self) -> int:
        """Times that the run has gone back."""
        return len(self._rewinds.done)

    def metadata(self) -> dict[str, int]:
        """What a checkpoint has to say of its time."""
        return {MADE_AFTER: self.count}

    def without_bad_data(self, batches: Batches) -> Batches:
        """The batches, with all left out that the run has gone back from."""
        steps = dataclasses.replace(batches.steps, skip=joined(self._skip, self._rewinds.skip))
        return dataclasses.replace(batches, steps=steps)

    def begin(self, state: TrainState) -> None:
        """Watches the steps that follow a state."""
        guard, since = jax.device_get(state.guard), self._rewinds.since
        self._watch = Watch(self._config.patience, guard, int(state.step), since, self._say)

    def look(self, step: int, figures: Sequence[StepMetrics]) -> Trouble | None:
        """Takes the figures of the latest of `step` updates; the trouble, if there is one."""
        return self._watch.add(step, figures)

    def plan(self, trouble: Trouble, steps: Steps) -> Rewind | None:
        """The way back from a trouble; `None` where the run has gone it often enough. A save under way is to be waited for.

        Args:
          trouble: of `look`.
          steps: of the batches as they are.
        """
        rewind = plan_rewind(trouble, self._checkpoints.agreed_steps(), steps.data_step)
        return None if self._rewinds.times(rewind.to) >= self._config.rewinds else rewind

    def go_back(self, rewind: Rewind) -> None:
        """Makes a way back lasting, whatever happens next; then the newest checkpoint is where to go on."""
        self._rewinds.add(rewind)
        self._checkpoints.discard([step for step in self._checkpoints.steps() if step > rewind.to])
        self._say(
            f"warning: {rewind.reason}: going back to step {rewind.to} ({self._rewinds.times(rewind.to)} of "
            f"{self._config.rewinds} times), and on without the data of steps {in_words(rewind.steps, 1)}"
        )

    def give_up(self, trouble: Trouble, steps: Steps, state: TrainState, arrays: Sequence[ArrayFigures]) -> DivergedError:
        """Writes the report on a run that cannot go on; the error to end it with.

        Args:
          trouble: of `look`.
          steps: of the batches as they are.
          state: of the run.
          arrays: its parameters and their gradients.
        """
        skipped = [{"step": one.step + 1, "data_step": steps.data_step(one.step), "loss": one.loss, "gradient_norm": one.norm}
                   for one in trouble.steps]  # fmt: skip
        report = {
            "step": int(state.step), "reason": trouble.reason, "skipped": skipped, "usual": usual(jax.device_get(state.guard)),
            "rewinds": [rewind._asdict() for rewind in self._rewinds.done], "skip_steps": steps.skip,
        }  # fmt: skip
        folder, last = write_postmortem(self._directory, report, arrays), trouble.steps[-1]
        return DivergedError(
            f"step {last.step + 1}: {trouble.reason} ({figures_in_words(last)}) after the run went back {self.count} times; "
            f"{folder} says more; lower optimizer.learning_rate, or raise guard.rewinds"
        )
