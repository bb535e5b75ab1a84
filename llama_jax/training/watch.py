"""Skipped steps as the host sees them: told to the user, and when there are too many of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llama_jax.data.steps import Pairs, joined
from llama_jax.training.guard import WINDOW, Guard
from llama_jax.training.step import StepMetrics

_MANY = WINDOW // 20  # skipped steps of the last `WINDOW`: 5 percent


class Skipped(NamedTuple):
    """A step that was skipped.

    Attributes:
      step: its number from 0, which is that of its batch.
      loss: of it; `None` if it was skipped before a restart.
      norm: of its gradient, likewise.
    """

    step: int
    loss: float | None = None
    norm: float | None = None


class Trouble(NamedTuple):
    """Skipped steps that are too many.

    Attributes:
      reason: how many, in words.
      steps: the latest of them, ascending; the last one was one too many.
    """

    reason: str
    steps: tuple[Skipped, ...]


class Watch:
    """Counts skipped steps over the figures of all steps, in their order; a restart changes nothing in what it finds.

    Args:
      patience: skipped steps in a row that are too many; so are as many as that and at least 5 % of the last 200.
      guard: of the state to go on with, on the host.
      step: updates that this state has.
      since: skipped steps before this one count no more: the run has been sent back for them already.
      say: takes one line of text.

    Attributes:
      skipped: steps skipped since the start of the run.
      streak: of these, the latest in a row.
    """

    def __init__(self, patience: int, guard: Guard, step: int, since: int, say: Callable[[str], None]) -> None:
        self._patience, self._say = patience, say
        self.skipped, self.streak = int(guard.skipped), min(int(guard.streak), max(0, step - since))
        self._recent = [Skipped(k) for k in range(max(step - WINDOW, since, 0), step) if guard.recent[k % WINDOW]]

    def add(self, step: int, figures: Sequence[StepMetrics]) -> Trouble | None:
        """Takes the figures of the latest steps, on the host; looks no further than to the first trouble.

        Args:
          step: updates done.
          figures: of the last ones.
        """
        news: list[Skipped] = []
        trouble = None
        for number, figure in enumerate(figures, step - len(figures)):
            if not figure.skipped:
                self.streak = 0
                continue
            news.append(Skipped(number, float(figure.loss), float(figure.grad_norm)))
            trouble = self._note(news[-1])
            if trouble is not None:
                break
        for line in skipped_lines(news):
            self._say(line)
        return trouble

    def _note(self, skipped: Skipped) -> Trouble | None:
        self.skipped, self.streak = self.skipped + 1, self.streak + 1
        self._recent = [one for one in self._recent if one.step > skipped.step - WINDOW] + [skipped]
        if self.streak >= self._patience:
            return Trouble(f"{self.streak} steps in a row were skipped", tuple(self._recent[-self.streak :]))
        if len(self._recent) >= max(self._patience, _MANY):
            return Trouble(f"{len(self._recent)} of the last {WINDOW} steps were skipped", tuple(self._recent))
        return None


def ranges(steps: Sequence[int]) -> Pairs:
    """Numbers as ranges, both ends included."""
    return joined(tuple((step, step) for step in steps))


def in_words(pairs: Pairs, shift: int = 0) -> str:
    """Ranges as a reader writes them: `3, 7 to 9`."""
    return ", ".join(f"{a + shift}" if a == b else f"{a + shift} to {b + shift}" for a, b in pairs)


def skipped_lines(skipped: Sequence[Skipped]) -> list[str]:
    """What is said of skipped steps: a line for each that stands alone, one for those in a row. Steps count from 1 here."""
    lines = []
    by_step = {one.step: one for one in skipped}
    for first, last in ranges(list(by_step)):
        which = f"step {last + 1}" if first == last else f"steps {first + 1} to {last + 1}"
        lines.append(f"warning: {which} skipped ({figures_in_words(by_step[last])}); nothing was learned there")
    return lines


def figures_in_words(skipped: Skipped) -> str:
    """Loss and gradient norm in words."""
    known = skipped.loss is not None and skipped.norm is not None
    return f"loss {skipped.loss:.4g}, gradient norm {skipped.norm:.4g}" if known else "before the restart"
