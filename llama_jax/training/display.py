"""A run on the screen: live on a terminal, plain lines elsewhere. It only shows numbers that it is
given.
"""

import collections
import math
import statistics
import typing
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from llama_jax.formatting import duration, si
from llama_jax.training.metrics import StepRecord

_REFRESHES_PER_SECOND = 8
_SPARK_WIDTH = 12
_LABELS = ("loss", "lr", "tok/s", "/step", "eta", "mfu", "goodput", "held-out")
_RECENT = 10  # records whose median step time gives the time left


@runtime_checkable
class Stream(Protocol):
    """What a display needs of a text stream; one with an `encoding` gets no character that it
    cannot encode.
    """

    def write(self, text: str, /) -> object:
        """Takes text."""

    def flush(self) -> object:
        """Passes on the records taken so far."""


@runtime_checkable
class Display(Protocol):
    """Where a run is shown; the calls come in this order, `step` and `event` any number of
    times.
    """

    def start(self, heading: Sequence[str], steps: int) -> None:
        """Shows the heading, line by line, of a run of `steps` updates in all."""

    def step(self, record: StepRecord) -> None:
        """Shows a record."""

    def event(self, text: str) -> None:
        """Shows one line about something that is not a number: a checkpoint, a sample, a
        warning.
        """

    def finish(self, summary: Mapping[str, str]) -> None:
        """Ends the display with a table of results; to be called after an error too, as it gives
        the terminal back.
        """


class Glyphs(NamedTuple):
    """The characters a stream can show.

    Attributes:
      spark: bars of rising height.
      full: the done part of the progress bar.
      empty: the rest of it.
      norm: name of the gradient norm.
    """

    spark: str
    full: str
    empty: str
    norm: str


_UNICODE = Glyphs("▁▂▃▄▅▆▇█", "━", "─", "‖g‖")
_ASCII = Glyphs("_.-=+*%#", "#", ".", "|g|")


def open_display(stream: Stream, interactive: bool) -> Display:
    """The display for a stream.

    Args:
      stream: where to; characters it cannot encode are replaced.
      interactive: whether it is a terminal that understands control codes.
    """
    return (
        LiveDisplay(Console(file=typing.cast(typing.TextIO, stream), force_terminal=True))
        if interactive
        else PlainDisplay(stream)
    )


class PlainDisplay:
    """One aligned line a record, no control codes: for files, pipes and dumb terminals."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None)
        self._glyphs = glyphs_of(self._encoding)
        self._progress = Progress(0)

    def start(self, heading: Sequence[str], steps: int) -> None:
        """Writes the heading."""
        self._progress = Progress(steps)
        for line in heading:
            self.event(line)

    def step(self, record: StepRecord) -> None:
        """Writes a line."""
        self._progress.add(record)
        self.event(
            "  ".join(
                [self._progress.count, *fields(self._progress, record.held_out_loss, self._glyphs)]
            )
        )

    def event(self, text: str) -> None:
        """Writes the text."""
        self._stream.write(encodable(text, self._encoding) + "\n")
        self._stream.flush()

    def finish(self, summary: Mapping[str, str]) -> None:
        """Writes the table."""
        for line in table(summary):
            self.event(line)


class LiveDisplay:
    """A progress bar with the latest numbers, redrawn in place; headings, events and the summary
    scroll above it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._glyphs = glyphs_of(console.encoding)
        self._progress = Progress(0)
        self._live = Live(console=console, refresh_per_second=_REFRESHES_PER_SECOND)

    def start(self, heading: Sequence[str], steps: int) -> None:
        """Prints the heading and opens the live region."""
        self._progress = Progress(steps)
        for line in heading:
            self.event(line)
        self._live.update(self._drawn())
        self._live.start()

    def step(self, record: StepRecord) -> None:
        """Updates the numbers; they appear at the next refresh."""
        self._progress.add(record)
        self._live.update(self._drawn())

    def event(self, text: str) -> None:
        """Prints a line above the live region."""
        self._console.print(Text(encodable(text, self._console.encoding)))

    def finish(self, summary: Mapping[str, str]) -> None:
        """Draws the last numbers, closes the live region and prints the table."""
        self._live.stop()
        for line in table(summary):
            self.event(line)

    def _drawn(self) -> Text:
        """The live region; made here and not in the thread that shows it, which would race with new
        records.
        """
        progress, width = self._progress, self._console.width
        head = (
            f"{progress.count} {bar(progress.fraction, max(width - 30, 6), self._glyphs)} "
            f"{progress.fraction:6.1%}"
        )
        lines = [head, *pack(fields(progress, progress.held_out_loss, self._glyphs), width)]
        text = Text("\n".join(lines), no_wrap=True, overflow="crop")
        text.highlight_words(_LABELS, "dim")
        text.highlight_words([self._glyphs.full * 2], "cyan")
        return text


class Progress:
    """The records so far, as far as a display needs them.

    Args:
      steps: updates of the whole run.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.latest: StepRecord | None = None
        self.held_out_loss: float | None = None
        self.losses: collections.deque[float] = collections.deque(maxlen=_SPARK_WIDTH)
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=_RECENT)

    def add(self, record: StepRecord) -> None:
        """Takes in a record."""
        self.latest = record
        self.losses.append(record.loss)
        self._step_seconds.append(record.step_seconds)
        if record.held_out_loss is not None:
            self.held_out_loss = record.held_out_loss

    @property
    def count(self) -> str:
        """Updates done of all, aligned."""
        done = self.latest.step if self.latest else 0
        return f"{done:>{len(f'{self.steps:,}')},}/{self.steps:,}"

    @property
    def fraction(self) -> float:
        """Share of the run that is done."""
        return self.latest.step / self.steps if self.latest and self.steps else 0.0

    @property
    def seconds_left(self) -> float:
        """Steps that are left times the median of the recent step times."""
        left = self.steps - self.latest.step if self.latest else self.steps
        return left * statistics.median(self._step_seconds) if self._step_seconds else math.nan


def fields(progress: Progress, held_out_loss: float | None, glyphs: Glyphs) -> list[str]:
    """The numbers of the latest record as texts of steady width, the most wanted first."""
    record = progress.latest
    if record is None:
        return ["compiling the first step"]
    speed = f"{si(record.tokens_per_second):>5} tok/s  {duration(record.step_seconds):>6}/step"
    texts = [
        f"loss {record.loss:7.4f} {sparkline(progress.losses, glyphs):<{_SPARK_WIDTH}}",
        f"{glyphs.norm} {record.gradient_norm:6.3f}",
        f"lr {record.learning_rate:.2e}",
        speed,
        f"eta {duration(progress.seconds_left):>6}",
    ]
    mfu = [] if record.mfu is None else [f"mfu {record.mfu:5.1%}"]
    goodput = [] if record.goodput is None else [f"goodput {record.goodput:5.1%}"]
    held_out = [] if held_out_loss is None else [f"held-out {held_out_loss:.4f}"]
    return texts + mfu + held_out + goodput + other_time(record.time)


def other_time(seconds: Mapping[str, float]) -> list[str]:
    """Shares of the wall time that went elsewhere than into updates, from one percent on."""
    total = sum(seconds.values()) or 1.0
    shares = {part: spent / total for part, spent in seconds.items() if part != "step"}
    return [f"{part} {share:.0%}" for part, share in shares.items() if share >= 0.01]


def sparkline(values: Sequence[float], glyphs: Glyphs) -> str:
    """One bar a value, the lowest and highest at the ends of the scale; a value that is not finite
    becomes `!`.
    """
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(glyphs.spark) - 1) / (high - low) if high > low else 0.0
    return "".join(
        glyphs.spark[round((v - low) * scale)] if math.isfinite(v) else "!" for v in values
    )


def bar(fraction: float, width: int, glyphs: Glyphs) -> str:
    """A progress bar of `width` characters."""
    done = min(max(int(fraction * width), 0), width)
    return glyphs.full * done + glyphs.empty * (width - done)


def pack(texts: Sequence[str], width: int) -> list[str]:
    """Texts joined into as few lines of `width` as hold them whole, order kept; a longer text has
    its own line.
    """
    lines: list[str] = []
    for text in texts:
        if lines and len(lines[-1]) + 2 + len(text) <= width:
            lines[-1] += f"  {text}"
        else:
            lines.append(text)
    return lines


def table(rows: Mapping[str, str]) -> list[str]:
    """Names and values in two columns."""
    width = max(map(len, rows), default=0)
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]


def glyphs_of(encoding: str | None) -> Glyphs:
    """The Unicode characters where an encoding has them all, else ASCII."""
    wanted = "".join(_UNICODE)
    return _UNICODE if encodable(wanted, encoding) == wanted else _ASCII


def encodable(text: str, encoding: str | None) -> str:
    """The text with `?` for characters that an encoding lacks."""
    name = encoding or "utf-8"
    return text.encode(name, "replace").decode(name)


# --- aside ---
#
# What the processes of a run beside the first show: their warnings.


class WorkerDisplay:
    """A display that leaves all but warnings to the first process.

    Args:
      stream: where to.
      prefix: says whose warnings they are.
    """

    def __init__(self, stream: Stream, prefix: str) -> None:
        self._stream, self._prefix = stream, prefix

    def start(self, heading: Sequence[str], steps: int) -> None:
        """Shows nothing."""

    def step(self, record: StepRecord) -> None:
        """Shows nothing."""

    def event(self, text: str) -> None:
        """Writes a warning."""
        if text.startswith("warning"):
            self._stream.write(f"{self._prefix}{text}\n")
            self._stream.flush()

    def finish(self, summary: Mapping[str, str]) -> None:
        """Shows nothing."""
