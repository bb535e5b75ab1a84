"""The numbers of a run: one record a step, and an append-only file of them, one JSON object a line."""

import errno
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

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
      mfu: `accounting.training_flops_per_token` times tokens a second, as a share of the peak FLOP/s of the devices, 0 to 1;
        `None` where the peak is unknown.
      held_out_loss: nats per token on held-out text, where this step was evaluated.
      time: seconds of wall time since the record before by part (`data`, `step`, `save`, `eval`, `compile`), see `Clock`.
      goodput: share of the wall time since the start of the run, restarts included, in updates that were kept.
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
        """The record under the names of the metrics file; what is `None` is left out, and what has never gone wrong."""
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
    """A file that lines are appended to, at worst torn at its end; a failing disk is told of once and never raises.

    Args:
      path: the file; made with its directory; `None` to write nothing.
      kind: what its lines are, for the warning.
      warn: takes one line of text.
      prepare: done before the file is opened; its failure counts as one of the file.
    """

    def __init__(
        self, path: Path | None, kind: str, warn: Callable[[str], None], prepare: Callable[[], None] = lambda: None
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
        # Unbuffered: a crash leaves at most one torn line, and a full disk is noticed at the line that did not fit.
        self._file = self._path.open("ab", buffering=0)
        self._torn = _ends_torn(self._path)

    def _append(self, line: str) -> None:
        if self._file is None:
            return
        data = (("\n" if self._torn else "") + line).encode()  # the line break ends the piece that a full disk left
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
                self._warn(f"{self._path}: {self._kind} cannot be written ({error.strerror}); training goes on without")
            self._warned = True


class MetricsFile:
    """An append-only file of metrics; training never fails for its sake.

    Args:
      path: the file, such as `metrics.jsonl`; `None` to write nothing.
      resume_step: lines of later steps, left by an interrupted run, are dropped, so that no step appears twice; 0 for a
        new run drops all.
      warn: takes one line of text, once, when the file cannot be written.
    """

    def __init__(self, path: Path | None, resume_step: int, warn: Callable[[str], None]) -> None:
        self._file = LineFile(path, "metrics", warn, lambda: None if path is None else drop_later(path, resume_step))

    def write(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Appends one line at once; names are flat, such as `train/loss`, and a number that is not finite becomes null."""
        values = {name: _plain(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}))

    def event(self, step: int, event: str, **facts: str | float | int | None) -> None:
        """Appends a line about something that happened, such as `{"step": 40, "event": "resumed"}`."""
        self._file.write(json.dumps({"step": step, "event": event, **facts}))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def drop_later(path: Path, step: int) -> None:
    """Leaves out of a file the lines of later steps, which are done again, and those that are torn."""
    if path.exists():
        _rewrite(path, [entry for entry in _entries(path) if entry["step"] <= step])


def read_metrics(path: Path) -> list[dict]:
    """The numbers in a metrics file, one entry a step, oldest first.

    The figures of an update and of the evaluation after it are two lines of one step. Events, and lines that a crash or a full
    disk has torn, are left out.
    """
    steps: dict[int, dict] = {}
    for entry in _entries(path):
        if "event" not in entry:
            steps.setdefault(entry["step"], {}).update(entry)
    return list(steps.values())


def read_events(path: Path) -> list[dict]:
    """The lines of a metrics file that tell of events, oldest first."""
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
    """Whether the last line has no end: a program was killed, or the disk full, in the middle of it."""
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
