"""The study's picture: accuracy against labels, and what pre-training is worth."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from launch.advise_charts import curves_of
from launch.charts import number


def picture(results: dict[str, Any], out: Path) -> None:
    """Write the picture as a PNG."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), dpi=110, layout="constrained", width_ratios=[1.35, 1])
    _accuracy(left, results)
    _benefit(right, results)
    figure.suptitle("\n".join(textwrap.wrap(results["recommendation"]["text"], 150)), fontsize=10)
    figure.savefig(out)
    plt.close(figure)


def _accuracy(axes: Axes, results: dict[str, Any]) -> None:
    for curve in curves_of(results):
        labels, value, low, high = zip(*curve.points, strict=True)
        style = "--" if curve.dashed else "-"
        axes.plot(labels, value, style, color=curve.colour, marker="o", markersize=4, label=curve.name)
        axes.fill_between(labels, low, high, color=curve.colour, alpha=0.1, linewidth=0)
    axes.set(title="Accuracy (bands: 95 % intervals)", ylabel="test accuracy, %")
    axes.legend(fontsize=8, framealpha=0.6, edgecolor="none")
    _labels(axes, results)


def _benefit(axes: Axes, results: dict[str, Any]) -> None:
    rows = results.get("benefit", [])
    for row in rows:
        low, high = 100 * row["low"], 100 * row["high"]
        colour = "#1a7f37" if row["helps"] else "#cf222e" if row["harms"] else "#7d8590"
        axes.plot([row["labels"]] * 2, [low, high], color=colour, linewidth=2)
        axes.plot(row["labels"], 100 * row["difference"], "o", color=colour, markersize=6)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="Best with pre-training minus best without", ylabel="points of accuracy")
    if not rows:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
    _labels(axes, results)


def _labels(axes: Axes, results: dict[str, Any]) -> None:
    budgets = sorted({row["labels"] for row in results["accuracy"]})
    axes.set_xscale("log")
    axes.set_xticks(budgets, [number(n) for n in budgets])
    axes.minorticks_off()
    axes.set_xlabel("labels")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
