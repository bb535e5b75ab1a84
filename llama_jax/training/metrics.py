"""The numbers of a run: one record a step, and an append-only file of them, one JSON object a
line.
"""

import contextlib
import errno
import functools
import io
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, Protocol, runtime_checkable

from llama_jax.errors import InputError, imported

RUN_METRICS = "metrics.jsonl"  # in the directory of a run

Metric = float | int | None


class StepRecord(NamedTuple):
    """What is known about one optimizer update, or about several since the record before.

    Attributes:
      step: updates done, this one included.
      loss: nats per token on the training batch.
      learning_rate: of this update.
      gradient_norm: global norm before clipping.
      tokens: trained on since the start of the run.
      tokens_per_second: over all devices.
      step_seconds: seconds per update.
      mfu: `accounting.training_flops_per_token` times tokens/second, as a share of the peak FLOP/s
        of the devices, 0 to 1; `None` where the peak is unknown.
      held_out_loss: nats per token on held-out text, where this step was evaluated.
      time: seconds of wall time since the record before by part (`data`, `step`, `save`, `eval`,
        `compile`), see `Clock`.
      goodput: share of the wall time since the start of the run, restarts included, in updates that
        were kept.
      skipped: updates since the start of the run that the guard has skipped.
      rewinds: times that the run has gone back.
      more: further means of the objective on the training batch, by name, such as `z_loss`.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    step_seconds: float
    mfu: float | None = None
    held_out_loss: float | None = None
    time: Mapping[str, float] = {}
    goodput: float | None = None
    skipped: int = 0
    rewinds: int = 0
    more: Mapping[str, float] = {}

    def flat(self) -> dict[str, Metric]:
        """The record under the names of the metrics file; `None` is left out, and a value with
        never gone wrong.
        """
        names = {
            "train/loss": self.loss,
            "train/learning_rate": self.learning_rate,
            "train/gradient_norm": self.gradient_norm,
            "train/tokens": self.tokens,
            "speed/tokens_per_second": self.tokens_per_second,
            "speed/step_seconds": self.step_seconds,
            "speed/mfu": self.mfu,
            "speed/goodput": self.goodput,
            "held_out/loss": self.held_out_loss,
            "train/skipped": self.skipped or None,
            "train/rewinds": self.rewinds or None,
        }
        names |= {f"train/{name}": value for name, value in self.more.items()}
        names |= {f"speed/time_{part}": seconds for part, seconds in self.time.items()}
        return {name: value for name, value in names.items() if value is not None}


class LineFile:
    """A file that lines are appended to, at worst torn at its end; a failing disk is reported once
    and never raises.

    Args:
      path: the file; made with its directory; `None` to write nothing.
      kind: what its lines are, for the warning.
      warn: takes one line of text.
      prepare: done before the file is opened; its failure counts as one of the file.
    """

    def __init__(
        self,
        path: Path | None,
        kind: str,
        warn: Callable[[str], None],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._path, self._kind = path, kind
        self._warn = warn
        self._warned = False
        self._torn = False
        self._file: io.FileIO | None = None
        self._guard(lambda: self._open(prepare))

    def write(self, line: str) -> None:
        """Appends a line at once."""
        self._guard(lambda: self._append(line + "\n"))

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._guard(self._file.close)

    def _open(self, prepare: Callable[[], None]) -> None:
        if self._path is None:
            return
        prepare()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a crash leaves at most one torn line, and a full disk is noticed at the line
        #   that did not fit.
        self._file = self._path.open("ab", buffering=0)
        self._torn = _ends_torn(self._path)

    def _append(self, line: str) -> None:
        if self._file is None:
            return
        data = (
            ("\n" if self._torn else "") + line
        ).encode()  # the line break ends the piece that a full disk left
        self._torn = True
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._torn = False

    def _guard(self, action: Callable[[], None]) -> None:
        """Runs an action on the file; the first failure is reported, the others are not."""
        try:
            action()
        except OSError as error:
            if not self._warned:
                self._warn(
                    f"{self._path}: {self._kind} cannot be written ({error.strerror}); "
                    "training continues without"
                )
            self._warned = True


class MetricsFile:
    """An append-only file of metrics; training never fails for its sake.

    Args:
      path: the file, such as `metrics.jsonl`; `None` to write nothing.
      resume_step: lines of later steps, left by an interrupted run, are dropped, so that no step
        appears twice; 0 for a new run drops all.
      warn: takes one line of text, once, when the file cannot be written.
    """

    def __init__(self, path: Path | None, resume_step: int, warn: Callable[[str], None]) -> None:
        self._file = LineFile(
            path, "metrics", warn, lambda: None if path is None else drop_later(path, resume_step)
        )

    def write(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Appends one line at once; names are flat, such as `train/loss`, and a number that is not
        finite becomes null.
        """
        values = {name: _plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}))

    def event(self, step: int, event: str, **facts: str | float | int | None) -> None:
        """Appends a line about something that happened, such as `{"step": 40, "event":
        "resumed"}`.
        """
        self._file.write(json.dumps({"step": step, "event": event, **facts}))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def drop_later(path: Path, step: int) -> None:
    """Leaves out of a file the lines of later steps, which are done again, and those that are
    torn.
    """
    if path.exists():
        _rewrite(path, [entry for entry in _entries(path) if entry["step"] <= step])


def read_metrics(path: Path) -> list[dict]:
    """The numbers in a metrics file, one entry a step, oldest first.

    The figures of an update and of the evaluation after it are two lines of one step. Events, and
    lines that a crash or a full disk has torn, are left out.
    """
    steps: dict[int, dict] = {}
    for entry in _entries(path):
        if "event" not in entry:
            steps.setdefault(entry["step"], {}).update(entry)
    return list(steps.values())


def read_events(path: Path) -> list[dict]:
    """The events of a metrics file, oldest first."""
    return [entry for entry in _entries(path) if "event" in entry]


def _entries(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", errors="replace") as file:
        return list(_whole_lines(file))


def _whole_lines(lines: IO[str]) -> Iterator[dict]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            yield entry


def _ends_torn(path: Path) -> bool:
    """Whether the last line has no end: a program was killed, or the disk full, in the middle of
    it.
    """
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _rewrite(path: Path, entries: list[dict]) -> None:
    """Replaces the file in one stroke: after a crash either the old one or the new one is there."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _plain(value: Metric) -> Metric:
    """A number as JSON knows it."""
    return value if value is None or math.isfinite(value) else None


# --- trackers ---
#
# Where the numbers of a run go beside its metrics file: TensorBoard, Weights & Biases, trackio;
# each by an extra.
#
# Training never fails because of them: a missing package is reported before the run begins, a
# failure later is warned of once.


_PROJECT = "llama_jax"
_ID_FILE = "tracker_id"
_STEP = "step"

Warn = Callable[[str], None]


class Tracked(NamedTuple):
    """Facts about a run that a tracker gets when it begins.

    Attributes:
      directory: of the run; its name is the run's.
      config: of the run as plain data, shown beside the curves.
      step: updates of the state to resume from; 0 at the start of a run.
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
        """Passes on the records taken so far; the last call."""


class TensorBoard:
    """Event files below `RUN/tensorboard`, by tensorboardX: no TensorFlow, no PyTorch. On resume,
    later points are purged.
    """

    def __init__(self, run: Tracked) -> None:
        package = imported("tensorboardX", "tensorboard")
        # Files are named by the second; the step keeps that of a quick resume from replacing the
        # one before.
        self._writer = package.SummaryWriter(
            str(run.directory / "tensorboard"),
            filename_suffix=f".{run.step}",
            purge_step=run.step + 1 if run.step else None,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes and flushes a point a number, so that a crash takes nothing along."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of the project `llama_jax` at Weights & Biases; its own environment variables
    (`WANDB_MODE=offline`) hold.
    """

    def __init__(self, run: Tracked) -> None:
        package = imported("wandb", "wandb")
        quiet = package.Settings(silent=True, console="off")  # the terminal is the display's
        self._run = package.init(
            project=_PROJECT,
            name=run.directory.name,
            id=run.identity,
            resume="allow",
            config=dict(run.config),
            dir=str(run.directory),
            settings=quiet,
        )
        # A step of our own: W&B's only ever grows, and steps done again after a crash would be
        # thrown away.
        self._run.define_metric("*", step_metric=_STEP)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands the numbers to W&B's own process, which sends them."""
        self._run.log({**metrics, _STEP: step})

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


class Trackio:
    """A run of the project `llama_jax` in trackio's local data base; `trackio show` plots it."""

    def __init__(self, run: Tracked) -> None:
        package = imported("trackio", "trackio")
        name = f"{run.directory.name}-{run.identity}"
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = package.init(
                project=_PROJECT, name=name, resume="allow", config=dict(run.config), embed=False
            )

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
        except Exception as error:  # whatever a foreign library raises: training continues
            if name not in self._warned:
                self._warn(failure(name, error))
            self._warned.add(name)


def failure(name: str, error: Exception) -> str:
    """One line about a tracker that failed."""
    words = " ".join(str(error).split())
    return f"warning: {name}: {type(error).__name__}: {words:.150}; training continues without"


def require_trackers(names: Sequence[str]) -> None:
    """Checks that the trackers are known and installed; before anything is compiled.

    Raises:
      InputError: naming the unknown tracker, or the missing extra.
    """
    for name in names:
        if name not in TRACKERS:
            raise InputError(f"tracker {name!r} is unknown; {', '.join(TRACKERS)} expected")
        imported(TRACKERS[name][0], name)


def open_trackers(
    names: Sequence[str], directory: Path, config: Mapping[str, object], step: int, warn: Warn
) -> Trackers:
    """The trackers of a run, by name; one that cannot be started is warned of and left out.

    Args:
      names: of `TRACKERS`.
      directory: of the run.
      config: of the run as plain data.
      step: updates of the state to resume from; 0 at the start of a run.
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
        except (
            Exception
        ) as error:  # no network, no account, no room: whatever a foreign library raises
            warn(failure(name, error))
    return Trackers(opened, warn)


def run_identity(directory: Path, step: int) -> str:
    """The identity of a run, kept in its directory: a resumed run continues its curve, a fresh
    one gets a new identity.
    """
    path = directory / _ID_FILE
    with contextlib.suppress(OSError):
        if step and path.exists():
            return path.read_text(encoding="utf-8").strip()
    identity = secrets.token_hex(4)
    with contextlib.suppress(OSError):  # a full disk: the next resume begins another curve
        path.write_text(identity, encoding="utf-8")
    return identity
