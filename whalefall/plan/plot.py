"""Plots as inline SVG, coloured by the style sheet of the page that holds them."""

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

_WIDTH, _HEIGHT = 460, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 30, 46
_COLOURS = 6
_LETTER = 6.6
"""Width of a letter of 12 pixels, about."""

Points = Sequence[tuple[float, float]]


def curve(line: Points, *, x: str, y: str, marked: Points = ()) -> str:
    """A line over two logarithmic axes; all values are above 0.

    Args:
        x, y: what the axes count.
        marked: points to look at.
    """
    across = _Axis.around([point[0] for point in line], _LEFT, _WIDTH - _RIGHT)
    up = _Axis.around([point[1] for point in line], _HEIGHT - _BOTTOM, _TOP)
    parts = [_open(_HEIGHT)]
    for value in across.ticks():
        at = across.at(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
        parts.append(_text(at, _HEIGHT - _BOTTOM + 16, short(value), "middle"))
    for value in up.ticks():
        at = up.at(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(_text(_LEFT - 7, at + 4, short(value), "end"))
    path = " ".join(f"{across.at(px):.1f},{up.at(py):.1f}" for px, py in line)
    parts.append(f'<polyline class="line" points="{path}"/>')
    for px, py in marked:
        at_x, at_y = across.at(px), up.at(py)
        parts.append(f'<circle class="mark" cx="{at_x:.1f}" cy="{at_y:.1f}" r="4.5"/>')
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x, "middle"))
    parts.append(_text(_LEFT - 46, _TOP - 14, y, "start"))
    return "".join([*parts, "</svg>"])


def bars(rows: Mapping[str, Mapping[str, float]], *, unit: str) -> str:
    """A bar a row, made of named parts that lie side by side, with its sum beside it."""
    rows = {row: {k: it for k, it in parts.items() if it} for row, parts in rows.items()}
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    most = max((sum(parts.values()) for parts in rows.values()), default=1)
    left = min(190.0, _LETTER * max(map(len, rows), default=0) + 12)
    scale = (_WIDTH - left - 92) / most
    legend = _legend(names, 12) if len(names) > 1 else []
    top = 24 + 18 * _legend_rows(names) if legend else 12
    parts = [_open(top + 34 * len(rows)), *legend]
    for index, (row, values) in enumerate(rows.items()):
        at, y = left, top + 34 * index
        parts.append(_text(left - 8, y + 15, row, "end"))
        for name, value in values.items():
            hint = escape(f"{name}: {_figure(value)} {unit}")
            parts.append(_bar(names.index(name), at, y, value * scale, 22, hint))
            at += value * scale
        parts.append(_text(at + 6, y + 15, f"{_figure(sum(values.values()))} {unit}", "start"))
    return "".join([*parts, "</svg>"])


def short(value: float) -> str:
    """``0.02``, ``5``, ``20 K``, ``3 M``, ``14.8 T``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class _Axis:
    """A logarithmic axis from one pixel to another."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.high, self.start, self.end = low, high, start, end

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> "_Axis":
        low, high = min(values), max(values)
        return cls(low / 1.15, high * 1.15, start, end)

    def at(self, value: float) -> float:
        share = log10(value / self.low) / log10(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten, and 2 and 5 times them where there is room."""
        powers = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        decades = log10(self.high / self.low)
        factors = (1, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2.5 else (1,)
        every = [factor * 10.0**power for power in powers for factor in factors]
        return [value for value in every if self.low <= value <= self.high]


def _open(height: float) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}">'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _bar(colour: int, x: float, y: float, width: float, height: float, hint: str = "") -> str:
    return (
        f'<rect class="bar c{colour % _COLOURS}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height}"><title>{hint}</title></rect>'
    )


def _legend_places(names: Sequence[str]) -> list[tuple[float, int]]:
    """Where each name begins, and in which row."""
    places, x, row = [], 12.0, 0
    for name in names:
        width = 34 + _LETTER * len(name)
        if x + width > _WIDTH and x > 12:
            x, row = 12.0, row + 1
        places.append((x, row))
        x += width
    return places


def _legend_rows(names: Sequence[str]) -> int:
    return _legend_places(names)[-1][1] + 1


def _legend(names: Sequence[str], top: float) -> list[str]:
    parts = []
    for index, (name, (x, row)) in enumerate(zip(names, _legend_places(names), strict=True)):
        y = top + 18 * row
        parts.append(_bar(index, x, y - 8, 10, 10))
        parts.append(_text(x + 15, y + 1, name, "start"))
    return parts
