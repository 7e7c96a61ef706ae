"""Geometry of the pages' charts, for templates/SVG: a plot is as many units wide as it has days, and 100 high.

The drawing is stretched to its place (preserveAspectRatio="none"), so texts stand beside it in HTML and stay readable on a
phone; colours are classes of the stylesheet, because the policy forbids style attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from models.intervals import Interval

HEIGHT = 100.0


@dataclass(frozen=True)
class Bar:
    """A rectangle of a stack: which column, which part of it, from where (the top) and how high."""

    column: int
    part: str
    y: float
    height: float


@dataclass(frozen=True)
class Bars:
    """A chart of stacked bars. top: the value at the upper edge, a round one."""

    columns: int
    top: int
    bars: list[Bar]


@dataclass(frozen=True)
class Band:
    """Shares with their intervals. lines, bands: pieces without gaps, as points of an SVG polyline and polygon; dots: all."""

    columns: int
    lines: list[str]
    bands: list[str]
    dots: list[tuple[float, float]]


def round_up(value: int) -> int:
    """The least of 2, 4, 6, 8, 10, 20, 40 … that is not below `value`: its half is whole too."""
    top = 1
    while True:
        for step in (2, 4, 6, 8, 10):
            if value <= step * top:
                return step * top
        top *= 10


def stacked(columns: Sequence[dict[str, int]]) -> Bars:
    """Columns of parts, the first part of each at the bottom."""
    top = round_up(max((sum(column.values()) for column in columns), default=0))
    bars = []
    for place, column in enumerate(columns):
        upper = HEIGHT
        for part, number in column.items():
            if number:
                height = HEIGHT * number / top
                upper -= height
                bars.append(Bar(place, part, round(upper, 3), round(height, 3)))
    return Bars(len(columns), top, bars)


def banded(shares: Sequence[Interval | None]) -> Band:
    """Shares from 0 (bottom) to 1 (top), one a column; where there is none, the line breaks."""
    pieces: list[list[tuple[float, Interval]]] = [[]]
    for place, share in enumerate(shares):
        if share is None:
            pieces.append([])
        else:
            pieces[-1].append((place + 0.5, share))
    pieces = [piece for piece in pieces if piece]
    lines = [points([(x, share.value) for x, share in piece]) for piece in pieces]
    bands = []
    for piece in pieces:
        wide = piece if len(piece) > 1 else [(piece[0][0] - 0.3, piece[0][1]), (piece[0][0] + 0.3, piece[0][1])]
        upper, lower = [(x, share.high) for x, share in wide], [(x, share.low) for x, share in reversed(wide)]
        bands.append(points(upper + lower))
    return Band(len(shares), lines, bands, [(x, height(share.value)) for piece in pieces for x, share in piece])


def height(share: float) -> float:
    """Where a share stands in a plot."""
    return round(HEIGHT * (1 - share), 3)


def points(of: Sequence[tuple[float, float]]) -> str:
    """Places and shares as SVG's points."""
    return " ".join(f"{x:g},{height(share):g}" for x, share in of)


def labels(days: Sequence[date], most: int = 5) -> list[date]:
    """Days to write below a chart: the first, the last, and some between at equal distances."""
    if len(days) <= most:
        return list(days)
    last = len(days) - 1
    return [days[round(last * place / (most - 1))] for place in range(most)]
