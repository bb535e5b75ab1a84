"""What stands on the screen, on terminals and elsewhere."""

import io
import math
import re

import pytest
from rich.console import Console

from llama_jax.formatting import duration, si
from llama_jax.training.display import LiveDisplay, bar, glyphs_of, open_display, pack, sparkline
from llama_jax.training.metrics import StepRecord

UNICODE, ASCII = glyphs_of("utf-8"), glyphs_of("ascii")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def record(step: int, loss: float = 2.0, **other) -> StepRecord:
    return StepRecord(step, loss, 3e-4, 0.42, step * 2048, 12345.0, 0.5, **other)


def play(display, steps=1000):
    display.start(["llama_jax · 3.2M parameters"], steps)
    display.step(record(10, loss=4.0, mfu=0.541))
    display.event("checkpoint 10 · 12 MB")
    display.step(record(20, loss=3.0, held_out_loss=3.25))
    display.step(record(30, loss=2.0))
    display.finish({"steps": "30", "best loss": "2.0000"})


def plain(encoding: str | None = None) -> str:
    if encoding is None:
        stream = io.StringIO()
        play(open_display(stream, interactive=False))
        return stream.getvalue()
    raw = io.BytesIO()
    wrapped = io.TextIOWrapper(raw, encoding=encoding)
    play(open_display(wrapped, interactive=False))
    return raw.getvalue().decode(encoding)


def live(width: int, file=None) -> str:
    stream = file or io.StringIO()
    play(LiveDisplay(Console(file=stream, force_terminal=True, width=width, height=30)))
    return stream.getvalue() if file is None else ""


def test_plain_lines():
    lines = plain().splitlines()
    assert lines[0] == "llama_jax · 3.2M parameters"
    assert re.fullmatch(
        r"   10/1,000  loss  4\.0000 ▁ {11}  ‖g‖  0\.420  lr 3\.00e-04  12\.3k tok/s  500 ms/step  eta 8m 15s  mfu 54\.1%",
        lines[1],
    )
    assert lines[2] == "checkpoint 10 · 12 MB"
    assert lines[3].endswith("held-out 3.2500")
    assert "held-out" not in lines[4]
    assert lines[5:] == ["steps      30", "best loss  2.0000"]


def test_plain_has_no_control_codes():
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", plain())


def test_plain_columns_are_aligned():
    columns = {line.index("tok/s") for line in plain().splitlines() if "tok/s" in line}
    assert len(columns) == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_plain_without_unicode(encoding):
    text = plain(encoding)
    assert "|g|" in text
    assert "checkpoint 10" in text


def test_live_shows_the_numbers():
    text = CONTROL.sub("", live(100))
    for part in (
        "30/1,000",
        "3.0%",
        "loss  2.0000 █▅▁",
        "12.3k tok/s",
        "eta 8m 05s",
        "held-out 3.2500",
        "checkpoint 10 · 12 MB",
    ):
        assert part in text
    assert text.rstrip().endswith("best loss  2.0000")


@pytest.mark.parametrize("width", [20, 40, 100])
def test_live_fits_the_width(width):
    lines = CONTROL.sub("", live(width).replace("\r", "\n")).splitlines()
    assert max(map(len, lines)) <= width


def test_live_gives_the_cursor_back():
    text = live(100)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1


def test_live_without_unicode():
    raw = io.BytesIO()
    live(60, io.TextIOWrapper(raw, encoding="ascii"))
    assert b"|g|" in raw.getvalue()


def test_the_terminal_decides_only_by_the_argument():
    stream = io.StringIO()
    display = open_display(stream, interactive=True)
    assert isinstance(display, LiveDisplay)
    play(display)
    assert "\x1b[" in stream.getvalue()


def test_before_the_first_step():
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=80))
    display.start([], 10)
    display.finish({})
    assert "compiling" in stream.getvalue()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([1.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([7, 0], "█▁"),
        ([1.0, math.nan, 3.0, math.inf], "▁!█!"),
        ([math.nan], "!"),
    ],
)
def test_sparkline(values, expected):
    assert sparkline(values, UNICODE) == expected
    assert sparkline(values, ASCII).isascii()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 ms"),
        (0.0123, "12.3 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (3.456, "3.46 s"),
        (59.9, "59.9 s"),
        (59.97, "1m 00s"),
        (245, "4m 05s"),
        (3599.7, "1h 00m"),
        (11520, "3h 12m"),
        (86399, "23h 59m"),
        (86400, "1d 00h"),
        (302400, "3d 12h"),
        (math.nan, "?"),
        (math.inf, "?"),
    ],
)
def test_duration(seconds, expected):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (999.4, "999"),
        (999.6, "1k"),
        (12345, "12.3k"),
        (1.21e6, "1.21M"),
        (4e9, "4G"),
        (15e12, "15T"),
        (math.nan, "?"),
    ],
)
def test_si(number, expected):
    assert si(number) == expected


@pytest.mark.parametrize(("fraction", "full"), [(0, 0), (0.5, 5), (0.99, 9), (1, 10), (1.2, 10)])
def test_bar(fraction, full):
    assert bar(fraction, 10, ASCII) == "#" * full + "." * (10 - full)


def test_pack():
    assert pack(["aaa", "bbb", "c", "dddddddddddd"], 8) == ["aaa  bbb", "c", "dddddddddddd"]


def test_the_time_left_follows_the_median():
    stream = io.StringIO()
    display = open_display(stream, interactive=False)
    display.start([], 110)
    for step, seconds in ((1, 50.0), (5, 1.0), (10, 1.0)):  # the first includes compilation
        display.step(record(step)._replace(step_seconds=seconds))
    assert "eta 1m 40s" in stream.getvalue().splitlines()[-1]
