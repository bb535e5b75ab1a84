"""Curves in a terminal: the first in Braille, eight dots a character, others as letters at their points; no dependency."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from llama_jax.training.curves import Points, shown_range
from llama_jax.training.display import pack, si

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
    title: str, lines: Sequence[Line], marks: Sequence[float], width: int, height: int, unicode: bool, from_zero: bool = False
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
    field = _Field(_padded(min(xs), max(xs)), _padded(bottom, top), max(8, width - _LABEL - 2), height, unicode)
    for number, line in enumerate(lines):
        field.draw(line.points, number)
    edge, corner, rule, tick = ("│", "└", "─", "┴") if unicode else ("|", "+", "-", "^")
    legend = [f"{field.sign(number)} {line.label}" for number, line in enumerate(lines)] if len(lines) > 1 else []
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

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float], width: int, height: int, unicode: bool) -> None:
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
        """Draws a curve: the first in Braille, straight between its points; others as marks at their points."""
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
            "".join(self._character((column, row)) for column in range(self.width)) for row in reversed(range(self._height))
        ]

    def _character(self, cell: tuple[int, int]) -> str:
        bits = self._bits.get(cell, 0)
        return self._cells.get(cell, chr(0x2800 + bits) if bits else " ")


def _place(value: float, low: float, high: float, size: int) -> int:
    """Which of `size` equal parts of a range a value lies in."""
    return min(size - 1, max(0, math.floor((value - low) / (high - low) * size)))
