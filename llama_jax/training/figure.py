"""The curves of runs as a picture, by matplotlib (extra `plot`)."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.errors import InputError, imported
from llama_jax.training.curves import FROM_ZERO, PANELS, Axis, RunCurves, shown_range, smoothed
from llama_jax.training.display import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that people with colour blindness can tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip
_SMOOTH_FROM = 100  # points of a curve that is also drawn smoothed
_REACH = 0.015  # of a curve's points, on either side, for the median in the smoothed one
_FORMATS = (".png", ".svg", ".pdf")


def require_picture(path: Path) -> None:
    """Checks that a picture can be drawn there, before runs are read.

    Raises:
      InputError: if matplotlib is not installed, for a file of another kind, and for a directory that is not there.
    """
    imported("matplotlib", "plot")
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"{path}: a file ending in {', '.join(_FORMATS)} expected")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path}: there is no directory {path.parent}; make it first")


def draw(runs: Sequence[RunCurves], path: Path, axis: Axis = "step") -> None:
    """Draws loss (held-out loss as points), learning rate, gradient norm and speed; resumes are dotted lines.

    Args:
      runs: one at least; several lie over each other.
      path: of the picture, in the format of its ending.
      axis: what lies along x.

    Raises:
      InputError: see `require_picture`.
    """
    require_picture(path)
    matplotlib = imported("matplotlib", "plot")
    figures = imported("matplotlib.figure", "plot")  # without pyplot: no state of the process, no window
    with matplotlib.rc_context(_STYLE):
        figure = figures.Figure(figsize=(11, 6.2), dpi=140, layout="constrained")
        grid = figure.add_gridspec(3, 2, width_ratios=(3, 2))
        places = [grid[:, 0], *[grid[row, 1] for row in range(3)]]
        for place, (title, metrics) in zip(places, PANELS):
            _panel(figure.add_subplot(place), runs, title, metrics, axis)
        figure.suptitle(" and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs", fontsize=12)
        figure.savefig(path)


def _panel(axes: "Axes", runs: Sequence[RunCurves], title: str, metrics: Sequence[str], axis: Axis) -> None:
    values: list[float] = []
    for run, colour in zip(runs, itertools.cycle(_COLOURS)):
        x, y = run.points(metrics[0], axis)
        values += y
        noisy = len(y) >= _SMOOTH_FROM
        axes.plot(
            x, y, color=colour, linewidth=0.7 if noisy else 1.5, alpha=0.35 if noisy else 1, label="" if noisy else run.name
        )
        if noisy:
            axes.plot(x, smoothed(y, round(len(y) * _REACH)), color=colour, linewidth=1.6, label=run.name)
        for more in metrics[1:]:
            axes.plot(
                *run.points(more, axis), "o", color=colour, markeredgecolor="white", markersize=6, label=f"{run.name}, held out"
            )
        for place in run.marks(axis):
            axes.axvline(place, color=colour, linestyle=":", linewidth=1, alpha=0.8)
    axes.set_title(title)
    axes.xaxis.set_major_formatter(lambda value, _: si(value) if value else "0")
    axes.yaxis.set_major_formatter(lambda value, _: si(value) if abs(value) >= 1000 else f"{value:.3g}")
    if values:
        low, high = shown_range(values, metrics[0] == FROM_ZERO)
        room = 0.05 * (high - low or abs(high) or 1.0)
        axes.set_ylim(low if metrics[0] == FROM_ZERO else low - room, high + room)
    if metrics[1:]:  # the large panel
        if any(run.resumes for run in runs):
            axes.plot([], [], ":", color="grey", label="resumed")
        axes.set_xlabel(axis)
        axes.legend()
