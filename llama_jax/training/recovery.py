"""What a run does about steps that go wrong again and again: it goes back and leaves out their
data, or gives up.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.axes import Array, Float, Parameters, PyTree
from llama_jax.data.batches import Batches, Pairs, Steps, joined
from llama_jax.data.packing import Batch
from llama_jax.errors import CorruptError, DivergedError
from llama_jax.storage import atomic_write
from llama_jax.training.config_sections import GuardConfig
from llama_jax.training.step import (
    RING,
    WINDOW,
    Guard,
    Recipe,
    StepMetrics,
    TrainState,
    summed_gradients,
)
from llama_jax.weights.checkpoint import Checkpoints
from llama_jax.weights.integrity import by_path

# --- watch ---
#
# Skipped steps as the host sees them: told to the user, and when there are too many of them.


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
    """Counts skipped steps over the figures of all steps, in their order; a restart changes nothing
    in the results.

    Args:
      patience: this many consecutive skipped steps are too many; so are this many and at least 5 %
        of the last 200.
      guard: of the state to resume from, on the host.
      step: updates that this state has.
      since: skipped steps before this one count no more: the run has been sent back for them
        already.
      say: takes one line of text.

    Attributes:
      skipped: steps skipped since the start of the run.
      streak: latest consecutive ones of these.
    """

    def __init__(
        self, patience: int, guard: Guard, step: int, since: int, say: Callable[[str], None]
    ) -> None:
        self._patience, self._say = patience, say
        self.skipped, self.streak = int(guard.skipped), min(int(guard.streak), max(0, step - since))
        self._recent = [
            Skipped(k)
            for k in range(max(step - WINDOW, since, 0), step)
            if guard.recent[k % WINDOW]
        ]

    def add(self, step: int, figures: Sequence[StepMetrics]) -> Trouble | None:
        """Takes the figures of the latest steps, on the host; looks no further than to the first
        trouble.

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
            return Trouble(
                f"{self.streak} consecutive steps were skipped", tuple(self._recent[-self.streak :])
            )
        if len(self._recent) >= max(self._patience, _MANY):
            return Trouble(
                f"{len(self._recent)} of the last {WINDOW} steps were skipped", tuple(self._recent)
            )
        return None


def ranges(steps: Sequence[int]) -> Pairs:
    """Numbers as ranges, both ends included."""
    return joined(tuple((step, step) for step in steps))


def in_words(pairs: Pairs, shift: int = 0) -> str:
    """Ranges as a reader writes them: `3, 7 to 9`."""
    return ", ".join(f"{a + shift}" if a == b else f"{a + shift} to {b + shift}" for a, b in pairs)


def skipped_lines(skipped: Sequence[Skipped]) -> list[str]:
    """Messages about skipped steps: one line for each single step, one for consecutive ones.
    Steps count from 1 here.
    """
    lines = []
    by_step = {one.step: one for one in skipped}
    for first, last in ranges(list(by_step)):
        which = f"step {last + 1}" if first == last else f"steps {first + 1} to {last + 1}"
        lines.append(
            f"warning: {which} skipped ({figures_in_words(by_step[last])}); nothing was "
            "learned there"
        )
    return lines


def figures_in_words(skipped: Skipped) -> str:
    """Loss and gradient norm in words."""
    known = skipped.loss is not None and skipped.norm is not None
    return (
        f"loss {skipped.loss:.4g}, gradient norm {skipped.norm:.4g}"
        if known
        else "before the restart"
    )


# --- postmortem ---
#
# What is known when a run is given up: `RUN/postmortem`, a report and a table of all arrays.


RUN_POSTMORTEM = "postmortem"  # in the directory of a run


class ArrayFigures(NamedTuple):
    """A parameter and its gradient at one batch.

    Attributes:
      path: of the parameter, with the number of its layer: `layers/3/attention/wq`.
      norm: of it.
      not_finite: numbers in it that are not finite.
      gradient_norm: of the gradient.
      gradient_not_finite: numbers in the gradient that are not finite.
    """

    path: str
    norm: float
    not_finite: int
    gradient_norm: float
    gradient_not_finite: int


def array_figures(
    recipe: Recipe, state: TrainState, batch: Batch, frozen: Sequence[Parameters]
) -> list[ArrayFigures]:
    """Every parameter and its gradient at a batch, layer by layer; compiles a program for it.

    Args:
      recipe: what an update is.
      state: of the run; not consumed.
      batch: micro-batches `[A, B, T]`.
      frozen: further arguments of the step.
    """

    def measured(state: TrainState, batch: Batch, *frozen: Parameters) -> tuple[PyTree, PyTree]:
        """Norms and counts of parameters and gradients, by path."""
        gradient = summed_gradients(recipe, state, batch, *frozen)[1]
        targets = jnp.maximum(recipe.objective.targets(batch), 1)
        trees = state.params, jax.tree.map(lambda g: g / targets, gradient)
        params, gradients = (
            {path: _measure(path, leaf) for path, leaf in by_path(tree).items()} for tree in trees
        )
        return params, gradients

    params, gradients = jax.device_get(jax.jit(measured)(state, batch, *frozen))
    rows = []
    for path, of_parameter in params.items():
        for layer, figures in enumerate(np.concatenate([of_parameter, gradients[path]], axis=1)):
            name = path.replace("layers/", f"layers/{layer}/", 1) if _is_stacked(path) else path
            norm, bad, gradient_norm, gradient_bad = map(float, figures)
            rows.append(ArrayFigures(name, norm, int(bad), gradient_norm, int(gradient_bad)))
    return rows


def _is_stacked(path: str) -> bool:
    return path.startswith("layers/")


def _measure(path: str, leaf: Array) -> Float[Array, "layers 2"]:
    """Norm, and number of values that are not finite, of an array or of each layer of a stacked
    one.
    """
    values = leaf.astype(jnp.float32) if _is_stacked(path) else leaf.astype(jnp.float32)[None]
    each = tuple(range(1, values.ndim))
    bad = jnp.sum(~jnp.isfinite(values), axis=each, dtype=jnp.float32)
    return jnp.stack([jnp.sqrt(jnp.sum(values**2, axis=each)), bad], axis=1)


def usual(guard: Guard) -> dict[str, dict[str, float | int]]:
    """Mean and standard deviation of the latest good losses and gradient norms; the guard is on the
    host.
    """
    filled = min(int(guard.good), RING)
    rings = {"loss": guard.losses[:filled], "gradient_norm": guard.norms[:filled]} if filled else {}
    return {
        name: {"mean": float(np.mean(ring)), "deviation": float(np.std(ring)), "steps": filled}
        for name, ring in rings.items()
    }


def write_postmortem(
    directory: Path, report: Mapping[str, object], arrays: Sequence[ArrayFigures] = ()
) -> Path:
    """Writes `report.json` and `arrays.tsv`; of several processes the first does.

    Args:
      directory: of the run.
      report: JSON values; numbers that are not finite are written as texts.
      arrays: of `array_figures`.

    Returns:
      The directory of the two.
    """
    folder = directory / RUN_POSTMORTEM
    if jax.process_index():
        return folder
    folder.mkdir(exist_ok=True)
    broken = next((row.path for row in arrays if row.not_finite or row.gradient_not_finite), None)
    with atomic_write(folder / "report.json") as file:
        file.write(
            (
                json.dumps(_plain({**report, "first_array_not_finite": broken}), indent=1) + "\n"
            ).encode()
        )
    with atomic_write(folder / "arrays.tsv") as file:
        for row in (ArrayFigures._fields, *arrays):
            file.write(
                (
                    "\t".join(
                        f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row
                    )
                    + "\n"
                ).encode()
            )
    return folder


def _plain(value: object) -> object:
    """A value as JSON knows it."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# --- rewind ---
#
# Going back: to a checkpoint from before too many steps were skipped, and on without the data that
#   they had read.
#
# What was gone back from is kept in `RUN/rewinds.json`. It is written before anything is removed,
# and checkpoints say how many times the run had gone back when they were made, so a run that is
# killed in the middle resumes where it was sent.


RUN_REWINDS = "rewinds.json"  # in the directory of a run
MADE_AFTER = "rewinds"  # in the metadata of a checkpoint: times that the run had gone back before


class Rewind(NamedTuple):
    """One time that a run went back.

    Attributes:
      to: updates that the state has which it went back to.
      reason: in words.
      steps: which steps had gone wrong, from 0.
      data: the data steps that they had read, which are left out afterwards.
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
      CorruptError: if the file makes no sense.
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
        return [
            step
            for step, metadata in saved.items()
            if self._left(step, metadata.get(MADE_AFTER, 0))
        ]

    def _left(self, step: int, made_after: int) -> bool:
        """Whether this holds for a checkpoint that was made after this number of rewinds."""
        return any(step > rewind.to for rewind in self.done[made_after:])


def _read(path: Path) -> tuple[Rewind, ...]:
    if not path.exists():
        return ()
    try:
        entries = json.loads(path.read_bytes())
        return tuple(
            Rewind(int(one["to"]), str(one["reason"]), _pairs(one["steps"]), _pairs(one["data"]))
            for one in entries
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptError(
            f"{path}: not written by a run ({error!r}); bring back a copy, or start anew"
        ) from None


def _pairs(values: Sequence[Sequence[int]]) -> Pairs:
    return tuple((int(first), int(last)) for first, last in values)


def plan_rewind(trouble: Trouble, saved: Sequence[int], data_step: Callable[[int], int]) -> Rewind:
    """Where to go back to, and what to leave out.

    The newest checkpoint from before all steps of the trouble; where none is left, from before the
    last of them; where there is none at all, the beginning.

    Args:
      trouble: skipped steps.
      saved: steps of the checkpoints; none was made after the last step of the trouble.
      data_step: which data a step has read.
    """
    numbers = [one.step for one in trouble.steps]
    before = [step for step in saved if step <= numbers[0]] or [
        step for step in saved if step <= numbers[-1]
    ]
    to = max(before) if saved else 0
    wrong = [number for number in numbers if number >= to]
    return Rewind(
        to, trouble.reason, ranges(wrong), ranges([data_step(number) for number in wrong])
    )


def let_go(state: PyTree) -> None:
    """Frees the memory of arrays at once, before others take their place."""
    for leaf in jax.tree.leaves(state):
        leaf.delete()


# --- recovery ---


class Recovery:
    """The watch over a run, and its ways back. `begin` comes before everything else, again after
    `go_back`.
    """

    def __init__(
        self,
        config: GuardConfig,
        skip: Pairs,
        directory: Path,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
    ) -> None:
        """Takes up earlier rewinds of the run, and completes one that a crash interrupted in
        it.

        Args:
          config: limits.
          skip: data steps that are left out anyway.
          directory: of the run.
          checkpoints: of the run.
          say: takes one line of text.

        Raises:
          CorruptError: if the run's record of it makes no sense.
        """
        self._config, self._skip, self._directory, self._say = config, skip, directory, say
        self._checkpoints, self._rewinds = checkpoints, Rewinds(directory)
        self._watch: Watch
        saved = {}
        for step in checkpoints.steps():
            with contextlib.suppress(CorruptError):  # the reader reports a damaged one
                saved[step] = checkpoints.metadata(step)
        checkpoints.discard(self._rewinds.left_behind(saved))

    @property
    def skipped(self) -> int:
        """Steps skipped since the start of the run."""
        return self._watch.skipped

    @property
    def streak(self) -> int:
        """Consecutive skipped steps up to now."""
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
        """The way back from a trouble; `None` where the run has gone it often enough. A save under
        way is to be waited for.

        Args:
          trouble: of `look`.
          steps: of the batches as they are.
        """
        rewind = plan_rewind(trouble, self._checkpoints.agreed_steps(), steps.data_step)
        return None if self._rewinds.times(rewind.to) >= self._config.rewinds else rewind

    def go_back(self, rewind: Rewind) -> None:
        """Makes a way back lasting, whatever happens next; then the newest checkpoint is where to
        go on.
        """
        self._rewinds.add(rewind)
        self._checkpoints.discard([step for step in self._checkpoints.steps() if step > rewind.to])
        self._say(
            f"warning: {rewind.reason}: going back to step {rewind.to} "
            f"({self._rewinds.times(rewind.to)} of "
            f"{self._config.rewinds} times), and on without the data of steps "
            f"{in_words(rewind.steps, 1)}"
        )

    def give_up(
        self, trouble: Trouble, steps: Steps, state: TrainState, arrays: Sequence[ArrayFigures]
    ) -> DivergedError:
        """Writes the report on a run that cannot continue; returns the error to end it with.

        Args:
          trouble: of `look`.
          steps: of the batches as they are.
          state: of the run.
          arrays: its parameters and their gradients.
        """
        skipped = [
            {
                "step": one.step + 1,
                "data_step": steps.data_step(one.step),
                "loss": one.loss,
                "gradient_norm": one.norm,
            }
            for one in trouble.steps
        ]
        report = {
            "step": int(state.step),
            "reason": trouble.reason,
            "skipped": skipped,
            "usual": usual(jax.device_get(state.guard)),
            "rewinds": [rewind._asdict() for rewind in self._rewinds.done],
            "skip_steps": steps.skip,
        }
        folder, last = write_postmortem(self._directory, report, arrays), trouble.steps[-1]
        return DivergedError(
            f"step {last.step + 1}: {trouble.reason} ({figures_in_words(last)}) after "
            f"the run went back {self.count} times; "
            f"{folder} says more; lower optimizer.learning_rate, or raise guard.rewinds"
        )
