"""Line charts as SVG, for pages that must open anywhere with nothing beside them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 12, 34


@dataclass
class Line:
    """One series of a chart."""

    points: Sequence[tuple[float, float]]
    """(x, y), x ascending; a y that is not finite breaks the line."""
    style: str = "line"
    """CSS class: `line`, or `faint` for what lies behind."""


@dataclass
class Chart:
    """A titled chart with one x axis."""

    title: str
    lines: Sequence[Line]
    x_label: str = "step"
    marks: Sequence[tuple[float, str]] = field(default_factory=list)
    """Vertical marks: (x, what happened)."""
    dots: bool = False
    """Whether each point is shown: for few of them."""
    from_zero: bool = False
    """Whether the y axis starts at 0: for rates and shares."""
    span: tuple[float, float] | None = None
    """Ends of the x axis, so that charts beside each other can be compared; by default those of the points."""


def svg(chart: Chart) -> str:
    """The chart as an `<svg>` element that scales to its container; empty text where there is nothing to draw."""
    points = [(x, y) for line in chart.lines for x, y in line.points if math.isfinite(y)]
    if not points:
        return ""
    xs, ys = chart.span or [x for x, _ in points], [y for _, y in points]
    across = _Axis(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    up = _Axis(min([0.0, *ys] if chart.from_zero else ys), max(ys), HEIGHT - _BOTTOM, _TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(chart.title)}">']
    for tick in up.ticks(5):
        y = up.place(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in across.ticks(5):
        x = across.place(tick)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 5}" text-anchor="end">{html.escape(chart.x_label)}</text>')
    for where, what in chart.marks:
        if across.low <= where <= across.high:
            x = across.place(where)
            parts.append(
                f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}">'
                f"<title>{html.escape(what)}</title></line>"
            )
    for line in chart.lines:
        parts += [f'<path class="{line.style}" d="{path}"/>' for path in _paths(line, across, up)]
        if chart.dots:
            parts += [
                f'<circle cx="{across.place(x):.1f}" cy="{up.place(y):.1f}" r="3">'
                f"<title>{x:g}: {y:.4g}</title></circle>"
                for x, y in line.points
                if math.isfinite(y)
            ]
    return "".join(parts) + "</svg>"


def number(value: float) -> str:
    """A tick's number, short: 1.5k, 20k, 3M, 0.001."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def thin(points: Sequence[tuple[float, float]], most: int = 800) -> list[tuple[float, float]]:
    """At most about `most` points: of each run of neighbours the mean, so that a long run stays a small page."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


@dataclass
class _Axis:
    """A linear map from values to pixels."""

    low: float
    high: float
    first: float
    last: float

    def __post_init__(self) -> None:
        if self.low == self.high:
            spread = abs(self.low) * 0.1 or 1.0
            self.low, self.high = self.low - spread, self.high + spread

    def place(self, value: float) -> float:
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self, about: int) -> list[float]:
        """Round numbers inside the axis."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first
        return [(first + i) * step for i in range(count + 1)]


def _paths(line: Line, across: _Axis, up: _Axis) -> list[str]:
    """The line's pieces between values that are not finite, as SVG path data."""
    pieces: list[list[str]] = [[]]
    for x, y in line.points:
        if math.isfinite(y):
            pieces[-1].append(f"{across.place(x):.1f} {up.place(y):.1f}")
        elif pieces[-1]:
            pieces.append([])
    return ["M" + "L".join(piece) for piece in pieces if piece]
