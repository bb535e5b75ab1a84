"""When the state of a run is saved, and how a failed save is handled: it is reported, and tried
again.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from llama_jax.errors import InputError
from llama_jax.formatting import duration
from llama_jax.storage import atomic_write
from llama_jax.training.config import TrainConfig
from llama_jax.training.evaluate import RUN_SAMPLES, Evaluation, PairEvaluation
from llama_jax.training.goodput import RUN_GOODPUT, Goodput
from llama_jax.training.metrics import RUN_METRICS
from llama_jax.training.optimizer import learning_rate_schedule
from llama_jax.training.recovery import RUN_POSTMORTEM, RUN_REWINDS
from llama_jax.training.run_log import RUN_PROFILE
from llama_jax.training.step import TrainState, all_finite
from llama_jax.training.watchdog import RUN_HEARTBEAT
from llama_jax.weights.checkpoint import Checkpoints, SaveError, list_steps
from llama_jax.weights.load import RUN_CHECKPOINTS

# free space that is asked for, in sizes of a state: the old checkpoint goes only when the new one
# is there
_ROOM = 2.2


class Saver:
    """The saves of one run. A failing disk costs checkpoints, not the run.

    Args:
      checkpoints: of the run.
      directory: that lies on the disk which they are written to.
      every: steps between two saves.
      metadata: gives the metadata of a checkpoint.
      say: takes one line of text.

    Attributes:
      failures: saves that failed.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        directory: Path,
        every: int,
        metadata: Callable[[], dict],
        say: Callable[[str], None],
    ) -> None:
        self._checkpoints, self._directory, self._every, self._metadata = (
            checkpoints,
            directory,
            every,
            metadata,
        )
        self._say = say
        self._looked = False  # at the room on the disk
        self._running = False  # whether a save has begun of which no failure is known
        # Other hosts may not know of a failure, and a save is made by all or by none: they wait for
        # the next that is due.
        self._alone = jax.process_count() == 1
        self._consecutive = 0  # failures since the last save that went well
        self._again: int | None = None  # the step after which a save that failed is tried again
        self.failures = 0

    def due(self, step: int) -> bool:
        """Whether the state after a step is to be saved; to be asked after every step, as it finds
        out the failed one.
        """
        self._attempt(step, self._checkpoints.poll)
        return step % self._every == 0 or (self._again is not None and step >= self._again)

    def save(self, step: int, state: TrainState) -> None:
        """Begins to save the state after a step, if its parameters are finite."""
        if not all_finite(state.params):
            self._say(f"warning: checkpoint {step} was not written: its parameters are not finite")
            return
        if not self._looked:
            self._look(state)
        if self._running:  # and so has ended well
            self._consecutive = 0
        if self._attempt(step, lambda: self._checkpoints.save(step, state, self._metadata())):
            self._running, self._again = True, None

    def go_back(self) -> None:
        """Forgets pending retries: the run has gone back to a checkpoint."""
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
        """Runs a checkpoint operation; a failure is reported, and the save becomes due again."""
        try:
            action()
        except SaveError as error:
            self._running = False
            self.failures += 1
            self._consecutive += 1
            # After 1, 2, 4, ... steps: a full disk stays full for a while, and a save that fails
            # costs time too.
            self._again = step + 2 ** min(self._consecutive - 1, 20) if self._alone else None
            times = f" ({self._consecutive} consecutive failures)" if self._consecutive > 1 else ""
            self._say(f"warning: {error}{times}")
            return False
        return True

    def _look(self, state: TrainState) -> None:
        """Warns of a disk that has too little room for checkpoints; once, before the first."""
        self._looked = True
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self._directory).free
        if free < _ROOM * size:
            self._say(
                f"warning: {self._directory}: {free / 1e9:.2f} GB free, a checkpoint has "
                f"{size / 1e9:.2f} GB; at least "
                f"{_ROOM * size / 1e9:.2f} GB expected; make room"
            )


# --- run directory ---
#
# The directory of a run: who may write there, how far it is, and what goes when it starts anew.


RUN_CONFIG = "config.yaml"
RUN_CONFIG_HISTORY = "config_history"  # a folder: the configs before it


@contextlib.contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """Holds a run's directory against a second run; the hold ends with the process, however that
    ends.

    Raises:
      InputError: if another process trains there.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"run.dir: another process trains in {directory}; wait for it, or name another"
            ) from None
        yield
    finally:
        os.close(handle)


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint in a run's directory, 0 if there is none."""
    checkpoints = directory / RUN_CHECKPOINTS
    return max(list_steps(checkpoints), default=0)


def clear_run(directory: Path) -> None:
    """Removes the files that a run wrote while training, so that the next one starts anew; prepared
    data stays.
    """
    for name in (RUN_CHECKPOINTS, RUN_PROFILE, RUN_POSTMORTEM, RUN_CONFIG_HISTORY):
        if (directory / name).exists():
            shutil.rmtree(directory / name)
    for name in (RUN_METRICS, RUN_GOODPUT, RUN_SAMPLES, RUN_REWINDS, RUN_HEARTBEAT):
        (directory / name).unlink(missing_ok=True)
    for stacks in directory.glob("hang*.txt"):
        stacks.unlink()


# --- summary ---
#
# How a run stands when the program ends.


class Summary(NamedTuple):
    """How a run stands when the program ends.

    Attributes:
      step: updates done.
      steps: updates wanted.
      evaluation: on the held-out text with the final parameters; `None` where this call did not
        come to the end, or nothing is.
      unigram: nats/token of drafting held-out tokens by their frequency in the training text, as a
        baseline; `None` where nothing is held out, and for pairs of answers.
      saved: whether the last state is on disk.
      goodput: where the wall time of the run went, restarts included.
      skipped: updates that the guard has skipped.
      rewinds: times that the run has gone back.
      failed_saves: checkpoints that could not be written.
    """

    step: int
    steps: int
    evaluation: Evaluation | PairEvaluation | None
    unigram: float | None
    saved: bool
    goodput: Goodput = Goodput()
    skipped: int = 0
    rewinds: int = 0
    failed_saves: int = 0


def summary_lines(summary: Summary, seconds: float) -> dict[str, str]:
    """A summary as the rows of the display's last table."""
    rows = {"steps": f"{summary.step} of {summary.steps}", "time": duration(seconds)}
    if summary.evaluation:
        rows["held-out"] = summary.evaluation.line()
    if summary.evaluation and summary.unigram is not None:
        rows["unigram"] = f"{summary.unigram:.4f} nats/token (the entropy to beat)"
    if summary.skipped or summary.rewinds:
        rows["skipped"] = (
            f"{summary.skipped} steps that went wrong; went back {summary.rewinds} times"
        )
    if summary.failed_saves:
        rows["checkpoints"] = f"{summary.failed_saves} could not be written" + (
            "" if summary.saved else ", the last among them"
        )
    return rows | summary.goodput.lines()


# --- changed settings ---
#
# A run resumed with other settings: the changes, their effect on the learning rate, and the configs
# before it.


_OWN = ("distributed.", "run.dir", "run.overwrite")  # of the program, not of the run
# relative change of the learning rate that is reported; a step of a short decay may change it by
# some percent
_JUMP = 0.05


def changed_settings(before: TrainConfig, now: TrainConfig) -> dict[str, str]:
    """Every setting that differs, by its dotted key, as `BEFORE -> NOW`."""
    ours, theirs = _flat(dataclasses.asdict(now)), _flat(dataclasses.asdict(before))
    keys = [key for key in dict.fromkeys((*ours, *theirs)) if not key.startswith(_OWN)]
    return {
        key: f"{theirs.get(key)} -> {ours.get(key)}"
        for key in keys
        if theirs.get(key) != ours.get(key)
    }


def learning_rate_jump(before: TrainConfig, now: TrainConfig, step: int) -> str | None:
    """What the changes do to the learning rate of the next update, and what to do about it; `None`
    where it does not jump.

    Args:
      before: the settings so far.
      now: those from here on.
      step: updates done.
    """
    old, new = (
        float(learning_rate_schedule(c.optimizer, c.run.steps)(step)) for c in (before, now)
    )
    if abs(new - old) <= _JUMP * old:
        return None
    times = f", {new / old:.3g} times as much" if old else ""
    line = (
        f"the learning rate jumps at step {step + 1}: {old:.4g} by the settings so far, "
        f"{new:.4g} now{times}"
    )
    lengths = [c.optimizer.schedule_steps or c.run.steps for c in (before, now)]
    return line if lengths[0] == lengths[1] else f"{line}; {schedule_choices(before, step)}"


def schedule_choices(before: TrainConfig, step: int) -> str:
    """The two things that are meant by training on, as options.

    Args:
      before: the settings so far.
      step: updates done.
    """
    rate = float(learning_rate_schedule(before.optimizer, before.run.steps)(step))
    length = before.optimizer.schedule_steps or before.run.steps
    return (
        f"--optimizer.schedule_steps {length} keeps the schedule so far, "
        f"--optimizer.decay_from {step} "
        f"--optimizer.learning_rate {rate:.4g} decays anew from here"
    )


def keep_config(directory: Path, step: int) -> None:
    """Copies the config of a run's directory into its history, before another takes its place.

    The copy is `config_history/until_step_STEP.yaml`, with a number behind it from the second of a
    step on.

    Args:
      directory: of the run.
      step: updates done with it.
    """
    source, history = directory / RUN_CONFIG, directory / RUN_CONFIG_HISTORY
    if not source.is_file():
        return
    content, number = source.read_bytes(), 1
    while True:
        copy = history / f"until_step_{step}{'' if number == 1 else f'_{number}'}.yaml"
        if not copy.exists():
            history.mkdir(exist_ok=True)
            with atomic_write(copy) as file:
                file.write(content)
        if (
            copy.read_bytes() == content
        ):  # also where a program was killed after it had made the copy
            return
        number += 1


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat
