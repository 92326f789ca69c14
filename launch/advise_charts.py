"""Curves over a logarithmic axis of labels, with bands, as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from launch.charts import number

WIDTH, HEIGHT = 560, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 12, 40
COLOURS = ("#1f6feb", "#d9730d", "#1a7f37", "#8250df", "#bf3989", "#0598bc", "#9a6700", "#cf222e")
GREY = "#7d8590"


@dataclass(frozen=True)
class Curve:
    """One arm's accuracies."""

    name: str
    points: Sequence[tuple[float, float, float, float]]
    """(labels, value, low, high), labels ascending; values in per cent."""
    colour: str
    dashed: bool
    """Whether it is a control."""


def curves_of(results: dict) -> list[Curve]:
    """The study's accuracy curves; controls are dashed, in the colour of what they are controls of."""
    strategies = list(dict.fromkeys(arm["strategy"] for arm in results["arms"] if arm["strategy"] != "majority"))
    curves = []
    for arm in results["arms"]:
        rows = [row for row in results["accuracy"] if row["arm"] == arm["name"]]
        points = [(r["labels"], *(100 * r[key] for key in ("accuracy", "low", "high"))) for r in rows]
        plain = arm["strategy"] == "majority"
        colour = GREY if plain else COLOURS[strategies.index(arm["strategy"]) % len(COLOURS)]
        if points:
            dashed = arm["weights"] in ("untrained", "none")
            curves.append(Curve(arm["name"], sorted(points), colour, dashed))
    return curves


def svg(title: str, curves: Sequence[Curve]) -> str:
    """Curves with their bands as an `<svg>` element that scales to its container."""
    labels = sorted({point[0] for curve in curves for point in curve.points})
    tops = [point[3] for curve in curves for point in curve.points]
    bottoms = [point[2] for curve in curves for point in curve.points]
    low, high = 10 * math.floor(min(bottoms) / 10), min(100, 10 * math.ceil(max(tops) / 10))
    first, last = math.log(labels[0]), math.log(labels[-1])
    spread = (last - first) or 1.0

    def x(value: float) -> float:
        share = (math.log(value) - first) / spread if last > first else 0.5
        return _LEFT + share * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - low) / ((high - low) or 1) * (HEIGHT - _BOTTOM - _TOP)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for tick in range(low, high + 1, 10 if high - low <= 60 else 20):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick} %</text>')
    for n in _apart(labels, x):
        parts.append(f'<text x="{x(n):.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">{number(n)}</text>')
    parts.append(f'<text x="{WIDTH - _RIGHT}" y="{HEIGHT - 4}" text-anchor="end">labels</text>')
    for curve in curves:
        upper = [f"{x(n):.1f} {y(up):.1f}" for n, _, _, up in curve.points]
        lower = [f"{x(n):.1f} {y(down):.1f}" for n, _, down, _ in reversed(curve.points)]
        parts.append(f'<path class="band" style="fill:{curve.colour}" d="M{"L".join(upper + lower)}Z"/>')
    for curve in curves:
        line = "L".join(f"{x(n):.1f} {y(value):.1f}" for n, value, _, _ in curve.points)
        dash = ";stroke-dasharray:6 4" if curve.dashed else ""
        parts.append(f'<path class="curve" style="stroke:{curve.colour}{dash}" d="M{line}"/>')
        for n, value, down, up in curve.points:
            told = f"{curve.name}, {n:,} labels: {value:.1f} % ({down:.1f} to {up:.1f})"
            dot = f'<circle style="fill:{curve.colour}" cx="{x(n):.1f}" cy="{y(value):.1f}" r="3">'
            parts.append(f"{dot}<title>{html.escape(told)}</title></circle>")
    return "".join(parts) + "</svg>"


def legend(curves: Sequence[Curve]) -> str:
    """The curves' names beside their strokes, as HTML that wraps."""
    kinds = {True: "dashed", False: "solid"}
    strokes = (f'<i style="border-top:3px {kinds[c.dashed]} {c.colour}"></i>' for c in curves)
    items = (f"<span>{stroke}{html.escape(c.name)}</span>" for stroke, c in zip(strokes, curves, strict=True))
    return f'<div class="legend">{"".join(items)}</div>'


def _apart(labels: Sequence[float], x, least: float = 34.0) -> list[float]:  # type: ignore[no-untyped-def]
    """Ticks that leave each other room; the last one stays."""
    kept = [labels[-1]]
    for tick in reversed(labels[:-1]):
        if x(kept[-1]) - x(tick) >= least:
            kept.append(tick)
    return kept
