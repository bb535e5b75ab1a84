"""Where the numbers of a run go beside its metrics file: TensorBoard, Weights & Biases, trackio; each by an extra.

Training never fails for their sake: what is missing is said before the run begins, what fails later is warned of once.
"""

import contextlib
import functools
import io
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from llama_jax.errors import InputError, imported
from llama_jax.training.metrics import Metric

_PROJECT = "llama_jax"
_ID_FILE = "tracker_id"
_STEP = "step"

Warn = Callable[[str], None]


class Tracked(NamedTuple):
    """What a tracker is told about a run when it begins.

    Attributes:
      directory: of the run; its name is the run's.
      config: of the run as plain data, shown beside the curves.
      step: updates that the state to go on with has; 0 at the start of a run.
      identity: the name under which services know the run, over all its resumes.
    """

    directory: Path
    config: Mapping[str, object]
    step: int
    identity: str


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers of a run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the numbers of one step under flat names such as `train/loss`; all are finite."""

    def close(self) -> None:
        """Hands on what was taken; the last call."""


class TensorBoard:
    """Event files below `RUN/tensorboard`, by tensorboardX: no TensorFlow, no PyTorch. On resume, later points are purged."""

    def __init__(self, run: Tracked) -> None:
        package = imported("tensorboardX", "tensorboard")
        # Files are named by the second; the step keeps that of a quick resume from replacing the one before.
        self._writer = package.SummaryWriter(str(run.directory / "tensorboard"), filename_suffix=f".{run.step}",
                                             purge_step=run.step + 1 if run.step else None)  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes and flushes a point a number, so that a crash takes nothing along."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `llama_jax` at Weights & Biases; its own environment variables (`WANDB_MODE=offline`) hold."""

    def __init__(self, run: Tracked) -> None:
        package = imported("wandb", "wandb")
        quiet = package.Settings(silent=True, console="off")  # the terminal is the display's
        self._run = package.init(project=_PROJECT, name=run.directory.name, id=run.identity, resume="allow",
                                 config=dict(run.config), dir=str(run.directory), settings=quiet)  # fmt: skip
        # A step of our own: W&B's only ever grows, and steps done again after a crash would be thrown away.
        self._run.define_metric("*", step_metric=_STEP)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands the numbers to W&B's own process, which sends them."""
        self._run.log({**metrics, _STEP: step})

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


class Trackio:
    """A run of the project `llama_jax` in trackio's local data base; `trackio show` draws it."""

    def __init__(self, run: Tracked) -> None:
        package = imported("trackio", "trackio")
        name = f"{run.directory.name}-{run.identity}"
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = package.init(project=_PROJECT, name=name, resume="allow", config=dict(run.config), embed=False)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Puts the numbers into the data base."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Waits until all is written."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


TRACKERS: Mapping[str, tuple[str, Callable[[Tracked], Tracker]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
    "trackio": ("trackio", Trackio),
}


class Trackers:
    """Several trackers as one that never fails; use `open_trackers` to make it."""

    def __init__(self, trackers: Mapping[str, Tracker], warn: Warn) -> None:
        self._trackers, self._warn = dict(trackers), warn
        self._warned: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Hands the numbers that are numbers to every tracker."""
        finite = {name: float(v) for name, v in metrics.items() if v is not None and v - v == 0}
        for name, tracker in self._trackers.items():
            self._guard(name, functools.partial(tracker.log, step, finite))

    def close(self) -> None:
        """Closes every tracker."""
        for name, tracker in self._trackers.items():
            self._guard(name, tracker.close)

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a foreign library raises: training goes on
            if name not in self._warned:
                self._warn(failure(name, error))
            self._warned.add(name)


def failure(name: str, error: Exception) -> str:
    """One line about a tracker that failed."""
    words = " ".join(str(error).split())
    return f"warning: {name}: {type(error).__name__}: {words:.150}; training goes on without"


def require_trackers(names: Sequence[str]) -> None:
    """Checks that the trackers are known and installed; before anything is compiled.

    Raises:
      InputError: naming what is unknown, or the extra that is missing.
    """
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"tracker {name!r} is unknown; {', '.join(TRACKERS)} expected")
        imported(TRACKERS[name][0], name)


def open_trackers(names: Sequence[str], directory: Path, config: Mapping[str, object], step: int, warn: Warn) -> Trackers:
    """The trackers of a run, by name; one that cannot be started is warned of and left out.

    Args:
      names: of `TRACKERS`.
      directory: of the run.
      config: of the run as plain data.
      step: updates that the state to go on with has; 0 at the start of a run.
      warn: takes one line of text.

    Raises:
      InputError: see `require_trackers`.
    """
    require_trackers(names)
    opened: dict[str, Tracker] = {}
    run = Tracked(directory, config, step, run_identity(directory, step) if names else "")
    for name in names:
        try:
            opened[name] = TRACKERS[name][1](run)
        except Exception as error:  # no network, no account, no room: whatever a foreign library raises
            warn(failure(name, error))
    return Trackers(opened, warn)


def run_identity(directory: Path, step: int) -> str:
    """The identity of a run, kept in its directory: a resumed run goes on with its curve, a fresh one gets a new identity."""
    path = directory / _ID_FILE
    with contextlib.suppress(OSError):
        if step and path.exists():
            return path.read_text(encoding="utf-8").strip()
    identity = secrets.token_hex(4)
    with contextlib.suppress(OSError):  # a full disk: the next resume begins another curve
        path.write_text(identity, encoding="utf-8")
    return identity
