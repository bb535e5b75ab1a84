"""The numbers of a run: one record a step, and an append-only file of them, one JSON object a line."""

import errno
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

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
      mfu: share of the peak FLOP/s of the devices, 0 to 1; `None` where the peak is unknown.
      held_out_loss: nats per token on held-out text, where this step was evaluated.
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

    def flat(self) -> dict[str, Metric]:
        """The record under the names of the metrics file; what is `None` is left out."""
        names = {
            "train/loss": self.loss,
            "train/learning_rate": self.learning_rate,
            "train/gradient_norm": self.gradient_norm,
            "train/tokens": self.tokens,
            "speed/tokens_per_second": self.tokens_per_second,
            "speed/step_seconds": self.step_seconds,
            "speed/mfu": self.mfu,
            "held_out/loss": self.held_out_loss,
        }
        return {name: value for name, value in names.items() if value is not None}


class MetricsFile:
    """An append-only file of metrics; training never fails for its sake.

    Args:
      path: the file, such as `metrics.jsonl`.
      resume_step: lines of later steps, left by an interrupted run, are dropped, so that no step appears twice; 0 for a
        new run drops all.
      warn: takes one line of text, once, when the file cannot be written.
    """

    def __init__(self, path: Path, resume_step: int, warn: Callable[[str], None]) -> None:
        self._path = path
        self._warn = warn
        self._warned = False
        self._torn = False
        self._file: io.FileIO | None = None
        self._guard(lambda: self._open(resume_step))

    def write(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Appends one line at once; names are flat, such as `train/loss`, and a number that is not finite becomes null."""
        values = {name: _plain(value) for name, value in metrics.items()}
        self._guard(lambda: self._append(json.dumps({"step": step, **values}) + "\n"))

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._guard(self._file.close)

    def _open(self, resume_step: int) -> None:
        if self._path.exists():
            _rewrite(self._path, [entry for entry in read_metrics(self._path) if entry["step"] <= resume_step])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: a crash leaves at most one torn line, and a full disk is noticed at the line that did not fit.
        self._file = self._path.open("ab", buffering=0)

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
                self._warn(f"{self._path}: metrics cannot be written ({error.strerror}); training goes on without them")
            self._warned = True


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file, oldest first; a line that a crash or a full disk has torn is left out."""
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
