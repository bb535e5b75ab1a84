"""`report`: the curves of runs, in the terminal or as a picture."""

import itertools
import math
import pathlib
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from llama_jax.cli.options import OptionParser
from llama_jax.cli.writing import prepare_output
from llama_jax.errors import InputError, imported
from llama_jax.formatting import si
from llama_jax.training.display import pack
from llama_jax.training.goodput import RUN_GOODPUT, Goodput, read_goodput, read_lines
from llama_jax.training.metrics import RUN_METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_WIDEST, _NARROWEST, _HEIGHT = 100, 40, 10


def make_parser(prog: str) -> OptionParser:
    """The options of `report`."""
    parser = OptionParser(
        prog,
        "Draws loss, learning rate, gradient norm and speed of runs; in the terminal if "
        "nothing is said.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="directory of a run, or its metrics.jsonl; several lie over each other",
    )
    parser.add_argument("--output", metavar="FILE", help="picture to write: .png, .svg or .pdf")
    parser.add_argument("--terminal", action="store_true", help="draw in the terminal as well")
    parser.add_argument(
        "--x", choices=("step", "tokens"), default="step", help="what lies along the curves"
    )
    return parser


def main(arguments: list[str], prog: str = "report") -> int:
    """Runs `report` and returns its exit status."""
    options = make_parser(prog).parse(arguments)

    prepare_output(json=False)

    output = None if options.output is None else pathlib.Path(options.output)
    if output is not None:
        require_picture(output)
    runs = read_runs([pathlib.Path(run) for run in options.runs])
    if output is None or options.terminal:
        print("\n".join(charts(runs, options.x)))
    for run in runs:
        print("\n".join(summary(run)))
    if output is not None:
        draw(runs, output, options.x)
        print(f"{output} written")
    return 0


def charts(runs: Sequence["RunCurves"], axis: Literal["step", "tokens"]) -> list[str]:
    """The panels for a terminal, one below the other."""
    from llama_jax.training.display import encodable

    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size((80, 24)).columns))
    unicode = encodable("⣿│└─┴", sys.stdout.encoding) == "⣿│└─┴"
    rows: list[str] = []
    for title, metrics in PANELS:
        kinds = {metrics[0]: "", **dict.fromkeys(metrics[1:], ", held out")}
        lines = [
            Line(run.points(name, axis), f"{run.name}{kind}")
            for run in runs
            for name, kind in kinds.items()
        ]
        lines = [line for line in lines if line.points[0]]
        if lines:
            marks = sorted({mark for run in runs for mark in run.marks(axis)})
            height = _HEIGHT if metrics[1:] else _HEIGHT // 2
            rows += [
                *plot(title, lines, marks, width, height, unicode, metrics[0] == FROM_ZERO),
                "",
            ]
    return rows


def summary(run: "RunCurves") -> list[str]:
    """A run in a few lines of text."""
    (_, losses), (at, held_out) = run.points("train/loss"), run.points("held_out/loss")
    tokens = run.points("train/tokens")[1]
    rows = [
        f"{run.name}: {int(run.entries[-1]['step']):,} steps, "
        f"{si(tokens[-1] if tokens else math.nan)} tokens, "
        f"loss {losses[-1] if losses else math.nan:.4f}"
    ]
    if held_out:
        best = min(held_out)
        rows.append(
            f"  held-out loss {held_out[-1]:.4f}, at best {best:.4f} at step "
            f"{int(at[held_out.index(best)]):,}"
        )
    if run.resumes:
        rows.append(f"  resumed from step {', '.join(f'{step:,}' for step in run.resumes)}")
    return rows + [f"  {name:11} {text}" for name, text in run.goodput.lines().items()]


# --- curves ---
#
# The curves of runs as their files hold them, for pictures and terminals.


Axis = Literal["step", "tokens"]
Points = tuple[list[float], list[float]]  # x and y

# What is drawn: title, and names in the metrics file, the first of which is the title's own.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("loss, nats/token", ("train/loss", "held_out/loss")),
    ("learning rate", ("train/learning_rate",)),
    ("gradient norm", ("train/gradient_norm",)),
    ("tokens/second", ("speed/tokens_per_second",)),
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
        found = [
            (_number_or_nan(entry.get(place)), _number_or_nan(entry.get(metric)))
            for entry in self.entries
        ]
        finite = [(x, y) for x, y in found if math.isfinite(x) and math.isfinite(y)]
        return [x for x, _ in finite], [y for _, y in finite]

    def marks(self, axis: Axis = "step") -> list[float]:
        """Where the run was resumed, on an axis."""
        if axis == "step":
            return [float(step) for step in self.resumes]
        places = {
            entry["step"]: _number_or_nan(entry.get("train/tokens")) for entry in self.entries
        }
        return [places[step] for step in self.resumes if math.isfinite(places.get(step, math.nan))]


def _number_or_nan(value: object) -> float:
    """A number of a file; not a number for anything else."""
    return (
        float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    )


def read_runs(paths: Sequence[Path]) -> list[RunCurves]:
    """The curves of several runs.

    Args:
      paths: directories of runs, or their metrics files.

    Raises:
      InputError: for a path without metrics.
    """
    files = [path / RUN_METRICS if path.is_dir() else path for path in paths]
    names = _names(
        [file.absolute().parent if file.name == RUN_METRICS else file.absolute() for file in files]
    )
    return [_read_run(file, name) for file, name in zip(files, names)]


def _read_run(file: Path, name: str) -> RunCurves:
    try:
        entries = read_metrics(file)
    except OSError as error:
        raise InputError(
            f"{file}: cannot be read ({error.strerror}); the directory of a run expected"
        ) from None
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
    """Median of the values at most `reach` away on either side, so that spikes leave no trace and
    slopes no lag.

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


# --- figure ---
#
# The curves of runs as a picture, by matplotlib (extra `plot`).


# Colours that people with colour blindness can tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
_SMOOTH_FROM = 100  # points of a curve that is also drawn smoothed
_REACH = 0.015  # of a curve's points, on either side, for the median in the smoothed one
_FORMATS = (".png", ".svg", ".pdf")


def require_picture(path: Path) -> None:
    """Checks that a picture can be drawn there, before runs are read.

    Raises:
      InputError: if matplotlib is not installed, for a file of another kind, and for a directory
        that is not there.
    """
    imported("matplotlib", "plot")
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"{path}: a file ending in {', '.join(_FORMATS)} expected")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no directory {path.parent}; make it first")


def draw(runs: Sequence[RunCurves], path: Path, axis: Axis = "step") -> None:
    """Draws loss (held-out loss as points), learning rate, gradient norm and speed; resumes are
    dotted lines.

    Args:
      runs: one at least; several lie over each other.
      path: of the picture, in the format of its ending.
      axis: what lies along x.

    Raises:
      InputError: see `require_picture`.
    """
    require_picture(path)
    matplotlib = imported("matplotlib", "plot")
    figures = imported(
        "matplotlib.figure", "plot"
    )  # without pyplot: no state of the process, no window
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(11, 6.2), dpi=140, layout="constrained")
        grid = figure.add_gridspec(3, 2, width_ratios=(3, 2))
        places = [grid[:, 0], *[grid[row, 1] for row in range(3)]]
        for place, (title, metrics) in zip(places, PANELS):
            _panel(figure.add_subplot(place), runs, title, metrics, axis)
        figure.suptitle(
            " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs",
            fontsize=12,
        )
        figure.savefig(path)


def _panel(
    axes: "Axes", runs: Sequence[RunCurves], title: str, metrics: Sequence[str], axis: Axis
) -> None:
    values: list[float] = []
    for run, colour in zip(runs, itertools.cycle(_COLOURS)):
        x, y = run.points(metrics[0], axis)
        values += y
        noisy = len(y) >= _SMOOTH_FROM
        axes.plot(
            x,
            y,
            color=colour,
            linewidth=0.7 if noisy else 1.5,
            alpha=0.35 if noisy else 1,
            label="" if noisy else run.name,
        )
        if noisy:
            axes.plot(
                x, smoothed(y, round(len(y) * _REACH)), color=colour, linewidth=1.6, label=run.name
            )
        for more in metrics[1:]:
            axes.plot(
                *run.points(more, axis),
                "o",
                color=colour,
                markeredgecolor="white",
                markersize=6,
                label=f"{run.name}, held out",
            )
        for place in run.marks(axis):
            axes.axvline(place, color=colour, linestyle=":", linewidth=1, alpha=0.8)
    axes.set_title(title)
    axes.xaxis.set_major_formatter(lambda value, _: si(value) if value else "0")
    axes.yaxis.set_major_formatter(
        lambda value, _: si(value) if abs(value) >= 1000 else f"{value:.3g}"
    )
    if values:
        low, high = shown_range(values, metrics[0] == FROM_ZERO)
        room = 0.05 * (high - low or abs(high) or 1.0)
        axes.set_ylim(low if metrics[0] == FROM_ZERO else low - room, high + room)
    if metrics[1:]:  # the large panel
        if any(run.resumes for run in runs):
            axes.plot([], [], ":", color="grey", label="resumed")
        axes.set_xlabel(axis)
        axes.legend()


# --- terminal plot ---
#
# Curves in a terminal: the first in Braille, eight dots a character, others as letters at their
# points; no dependency.


# Bits of the dots of U+2800 by row and column.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_MARKS = "*ox+#@"  # of curves drawn as characters; the first is only needed without Braille
_LABEL = 9  # characters of the labels at the left


class Line(NamedTuple):
    """One curve.

    Attributes:
      points: x and y.
      label: for the legend.
    """

    points: Points
    label: str


def plot(
    title: str,
    lines: Sequence[Line],
    marks: Sequence[float],
    width: int,
    height: int,
    unicode: bool,
    from_zero: bool = False,
) -> list[str]:
    """A chart as lines of text, none longer than `width`; later curves lie above earlier ones.

    Args:
      title: stands above.
      lines: curves with at least one point in all.
      marks: places on the x axis to point at, where a run was resumed.
      width: characters in all.
      height: characters of the field.
      unicode: whether the terminal has the characters of Braille and of boxes.
      from_zero: whether the y axis begins at 0.
    """
    xs = [x for line in lines for x in line.points[0]]
    bottom, top = shown_range([y for line in lines for y in line.points[1]], from_zero)
    field = _Field(
        _padded(min(xs), max(xs)), _padded(bottom, top), max(8, width - _LABEL - 2), height, unicode
    )
    for number, line in enumerate(lines):
        field.draw(line.points, number)
    edge, corner, rule, tick = ("│", "└", "─", "┴") if unicode else ("|", "+", "-", "^")
    legend = (
        [f"{field.sign(number)} {line.label}" for number, line in enumerate(lines)]
        if len(lines) > 1
        else []
    )
    rows = field.rows()
    labels = {0: _number(top), height - 1: _number(bottom)}
    body = [f"{labels.get(i, ''):>{_LABEL}} {edge}{row}".rstrip() for i, row in enumerate(rows)]
    ticks = {field.column(x) for x in marks if min(xs) <= x <= max(xs)}
    axis = "".join(tick if column in ticks else rule for column in range(field.width))
    low, high = si(min(xs)), si(max(xs))
    foot = f"{low}{high:>{max(1, field.width - len(low))}}"
    head = [row[:width] for row in pack([title, *legend], width)]
    return [*head, *body, f"{'':{_LABEL}} {corner}{axis}", f"{'':{_LABEL}}  {foot}"]


def _padded(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    room = abs(low) * 0.05 or 1.0
    return (low, high) if high > low else (low - room, high + room)


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.4g}" if abs(value) < 1000 else si(value)


class _Field:
    """The characters of a chart."""

    def __init__(
        self,
        xs: tuple[float, float],
        ys: tuple[float, float],
        width: int,
        height: int,
        unicode: bool,
    ) -> None:
        self.width, self._height, self._unicode = width, height, unicode
        self._xs, self._ys = xs, ys
        self._cells: dict[tuple[int, int], str] = {}  # column and row from below
        self._bits: dict[tuple[int, int], int] = {}

    def sign(self, number: int) -> str:
        """What a curve is drawn with."""
        return "⣀⠤⠒" if self._unicode and number == 0 else _MARKS[number % len(_MARKS)]

    def column(self, x: float) -> int:
        """The character above which a place on the x axis lies."""
        return _place(x, *self._xs, self.width)

    def draw(self, points: Points, number: int) -> None:
        """Draws a curve: the first in Braille, straight between its points; others as marks at
        their points.
        """
        if self._unicode and number == 0:
            self._draw_dots(points)
        else:
            for x, y in zip(*points):
                self._cells[self.column(x), _place(y, *self._ys, self._height)] = self.sign(number)

    def _draw_dots(self, points: Points) -> None:
        xs = [_place(x, *self._xs, self.width * 2) for x in points[0]]
        ys = [_place(y, *self._ys, self._height * 4) for y in points[1]]
        spots = list(zip(xs, ys))
        for (x0, y0), (x1, y1) in zip(spots, spots[1:] or spots):
            steps = max(abs(x1 - x0), abs(y1 - y0), 1)
            for i in range(steps + 1):
                x, y = round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps)
                cell = (x // 2, y // 4)
                self._bits[cell] = self._bits.get(cell, 0) | _DOTS[3 - y % 4][x % 2]

    def rows(self) -> list[str]:
        """The characters, the uppermost row first."""
        return [
            "".join(self._character((column, row)) for column in range(self.width))
            for row in reversed(range(self._height))
        ]

    def _character(self, cell: tuple[int, int]) -> str:
        bits = self._bits.get(cell, 0)
        return self._cells.get(cell, chr(0x2800 + bits) if bits else " ")


def _place(value: float, low: float, high: float, size: int) -> int:
    """Which of `size` equal parts of a range a value lies in."""
    return min(size - 1, max(0, math.floor((value - low) / (high - low) * size)))
