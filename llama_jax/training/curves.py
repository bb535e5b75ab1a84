"""The curves of runs as their files hold them, for pictures and terminals."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from llama_jax.errors import InputError
from llama_jax.training.goodput import RUN_GOODPUT, Goodput, read_goodput, read_lines
from llama_jax.training.metrics import RUN_METRICS, read_metrics

Axis = Literal["step", "tokens"]
Points = tuple[list[float], list[float]]  # x and y

# What is drawn: title, and names in the metrics file, the first of which is the title's own.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss, nats a token", ("train/loss", "held_out/loss")),
    ("learning rate", ("train/learning_rate",)),
    ("gradient norm", ("train/gradient_norm",)),
    ("tokens a second", ("speed/tokens_per_second",)),
)
FROM_ZERO = "speed/tokens_per_second"  # shown from 0, so that a tenth more looks like a tenth more


class RunCurves(NamedTuple):
    """What a run has written down.

    Attributes:
      name: for legends.
      entries: the lines of its metrics, oldest first.
      resumes: steps from which a program went on with it.
      goodput: where its time went; empty where nobody has noted it.
    """

    name: str
    entries: list[dict]
    resumes: list[int]
    goodput: Goodput

    def points(self, metric: str, axis: Axis = "step") -> Points:
        """A metric over steps or tokens, where it is a number."""
        place = {"step": "step", "tokens": "train/tokens"}[axis]
        found = [(_number(entry.get(place)), _number(entry.get(metric))) for entry in self.entries]
        finite = [(x, y) for x, y in found if math.isfinite(x) and math.isfinite(y)]
        return [x for x, _ in finite], [y for _, y in finite]

    def marks(self, axis: Axis = "step") -> list[float]:
        """Where the run was resumed, on an axis."""
        if axis == "step":
            return [float(step) for step in self.resumes]
        places = {entry["step"]: _number(entry.get("train/tokens")) for entry in self.entries}
        return [places[step] for step in self.resumes if math.isfinite(places.get(step, math.nan))]


def _number(value: object) -> float:
    """A number of a file; not a number for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def read_runs(paths: Sequence[Path]) -> list[RunCurves]:
    """The curves of several runs.

    Args:
      paths: directories of runs, or their metrics files.

    Raises:
      InputError: for a path without metrics.
    """
    files = [path / RUN_METRICS if path.is_dir() else path for path in paths]
    names = _names([file.absolute().parent if file.name == RUN_METRICS else file.absolute() for file in files])
    return [_read_run(file, name) for file, name in zip(files, names)]


def _read_run(file: Path, name: str) -> RunCurves:
    try:
        entries = read_metrics(file)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); the directory of a run expected") from None
    if not entries:
        raise InputError(f"{file}: no metrics yet; a run that has logged a step expected")
    beside = file.parent / RUN_GOODPUT
    starts = {entry.get("step") for entry in read_lines(beside) if entry.get("event") == "start"}
    resumes = sorted(step for step in starts if isinstance(step, int) and step > 0)
    return RunCurves(name, entries, resumes, read_goodput(beside))


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Median of the values at most `reach` away on either side, so that spikes leave no trace and slopes no lag.

    Towards the ends the window shrinks on both sides alike.
    """
    last = len(values) - 1
    near = [min(reach, i, last - i) for i in range(len(values))]
    return [statistics.median(values[i - n : i + n + 1]) for i, n in enumerate(near)]


def shown_range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    """The part of the y axis to show: all, but for rare spikes that would press the rest flat.

    Args:
      values: at least one.
      from_zero: whether the axis begins at 0.
    """
    ranked = sorted(values)
    low, usual, peak = ranked[0], ranked[int(0.99 * (len(ranked) - 1))], ranked[-1]
    high = usual if len(ranked) >= 20 and peak - low > 4 * (usual - low) > 0 else peak
    return (min(0.0, low) if from_zero else low), high
