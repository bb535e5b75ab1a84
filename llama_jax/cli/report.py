"""`report`: the curves of runs, in the terminal or as a picture."""

import math
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from llama_jax.cli.options import OptionParser
from llama_jax.cli.writing import prepare_output

if TYPE_CHECKING:
    from llama_jax.training.curves import RunCurves

_WIDEST, _NARROWEST, _HEIGHT = 100, 40, 10


def make_parser(prog: str) -> OptionParser:
    """The options of `report`."""
    parser = OptionParser(
        prog, "Draws loss, learning rate, gradient norm and speed of runs; in the terminal if nothing is said."
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="directory of a run, or its metrics.jsonl; several lie over each other"
    )
    parser.add_argument("--output", metavar="FILE", help="picture to write: .png, .svg or .pdf")
    parser.add_argument("--terminal", action="store_true", help="draw in the terminal as well")
    parser.add_argument("--x", choices=("step", "tokens"), default="step", help="what lies along the curves")
    return parser


def main(arguments: list[str], prog: str = "report") -> int:
    """Runs `report` and returns its exit status."""
    options = make_parser(prog).parse(arguments)
    from llama_jax.training.curves import read_runs

    prepare_output(json=False)

    output = None if options.output is None else pathlib.Path(options.output)
    if output is not None:
        from llama_jax.training.figure import draw, require_picture

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
    from llama_jax.training.curves import FROM_ZERO, PANELS
    from llama_jax.training.display import encodable
    from llama_jax.training.terminal_plot import Line, plot

    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size((80, 24)).columns))
    unicode = encodable("⣿│└─┴", sys.stdout.encoding) == "⣿│└─┴"
    rows: list[str] = []
    for title, metrics in PANELS:
        kinds = {metrics[0]: "", **dict.fromkeys(metrics[1:], ", held out")}
        lines = [Line(run.points(name, axis), f"{run.name}{kind}") for run in runs for name, kind in kinds.items()]
        lines = [line for line in lines if line.points[0]]
        if lines:
            marks = sorted({mark for run in runs for mark in run.marks(axis)})
            height = _HEIGHT if metrics[1:] else _HEIGHT // 2
            rows += [*plot(title, lines, marks, width, height, unicode, metrics[0] == FROM_ZERO), ""]
    return rows


def summary(run: "RunCurves") -> list[str]:
    """A run in a few lines of text."""
    from llama_jax.training.display import si

    (_, losses), (at, held_out) = run.points("train/loss"), run.points("held_out/loss")
    tokens = run.points("train/tokens")[1]
    rows = [f"{run.name}: {int(run.entries[-1]['step']):,} steps, {si(tokens[-1] if tokens else math.nan)} tokens, "
            f"loss {losses[-1] if losses else math.nan:.4f}"]  # fmt: skip
    if held_out:
        best = min(held_out)
        rows.append(f"  held-out loss {held_out[-1]:.4f}, at best {best:.4f} at step {int(at[held_out.index(best)]):,}")
    if run.resumes:
        rows.append(f"  resumed from step {', '.join(f'{step:,}' for step in run.resumes)}")
    return rows + [f"  {name:11} {text}" for name, text in run.goodput.lines().items()]
