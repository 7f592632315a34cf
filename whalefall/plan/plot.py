"""Plots as inline SVG, coloured by the style sheet of the page that holds them."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import NamedTuple

from whalefall.plan.templates import rendered

WIDTH = 460
LETTER = 6.6
"""Width of a letter of 12 pixels, about."""

Points = Sequence[tuple[float, float]]


class Axis(NamedTuple):
    """A logarithmic axis from one pixel to another."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> "Axis":
        return cls(min(values) / 1.15, max(values) * 1.15, start, end)

    def at(self, value: float) -> float:
        share = log10(value / self.low) / log10(self.high / self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Powers of ten, and 2 and 5 times them where there is room."""
        powers = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        decades = log10(self.high / self.low)
        factors = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
        every = [factor * 10.0**power for power in powers for factor in factors]
        return [value for value in every if self.low <= value <= self.high]


def curve(line: Points, *, x: str, y: str, marked: Points = ()) -> str:
    """A line over two logarithmic axes; all values are above 0.

    Args:
        x, y: what the axes count.
        marked: points to look at.
    """
    across = Axis.around([point[0] for point in line], 62, 444)
    up = Axis.around([point[1] for point in line], 244, 30)
    return rendered("curve.svg", line=line, marked=marked, across=across, up=up, x=x, y=y)


def bars(rows: Mapping[str, Mapping[str, float]], *, unit: str) -> str:
    """A bar a row, made of named parts that lie side by side, with its sum beside it."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts if parts[name]))
    most = max((sum(parts.values()) for parts in rows.values()), default=1)
    left = min(190.0, LETTER * max(map(len, rows), default=0) + 12)
    legend = _legend(names) if len(names) > 1 else []
    return rendered(
        "bars.svg",
        rows=rows,
        unit=unit,
        names=names,
        legend=legend,
        left=left,
        top=24 + 18 * (legend[-1][1] + 1) if legend else 12,
        scale=(WIDTH - left - 92) / most,
    )


def _legend(names: Sequence[str]) -> list[tuple[float, int]]:
    """Where each name begins, and in which row."""
    places, x, row = [], 12.0, 0
    for name in names:
        width = 34 + LETTER * len(name)
        if x + width > WIDTH and x > 12:
            x, row = 12.0, row + 1
        places.append((x, row))
        x += width
    return places
