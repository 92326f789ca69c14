"""Pictures of a judgement: the confusion matrix and the reliability diagram, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.calibration import BINS, bin_numbers
from finetune.classified import Classified

_NAMED = 60
"""Up to so many classes every row has its name; above, every few have."""
_NUMBERED = 30
"""Up to so many classes every cell has its count written in it."""


def draw_confusion(matrix: NDArray[np.int64], classes: list[str], path: Path) -> None:
    """Rows are true classes, columns predictions; colour is the share of the row, numbers are counts.

    Colours go by the square root of the share: one mistake in fifty is meant to be seen.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(classes)
    longest = max(len(name) for name in (_short(name) for name in classes))
    side = float(np.clip(0.42 * count, 3.0, 14.0))
    margin = 0.08 * longest + 0.7
    figure = Figure(figsize=(side + margin + 1.2, side + margin), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0.0, 1.0), interpolation="nearest")
    places = list(range(0, count, 1 if count <= _NAMED else -(-count // 50)))
    names = [_short(classes[place]) for place in places]
    size = float(np.clip(0.7 * 72 * side / len(places), 5.0, 9.0))
    axes.set_xticks(places, names, rotation=90, fontsize=size)
    axes.set_yticks(places, names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{int(matrix.diagonal().sum()):,} of {int(matrix.sum()):,} right", fontsize=10)
    if count <= _NUMBERED:
        widest = len(str(int(matrix.max())))
        cell = min(size, side / count * 72 / (0.75 * max(widest, 2)))
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.35 else "black"
            axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=cell, color=colour)
    figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, label="share of the true class")
    figure.savefig(path)


def draw_reliability(judged: Classified, measures: dict[str, float], path: Path) -> None:
    """Accuracy against confidence in equal-width bins, over a histogram of confidences (Guo et al. 2017, fig. 1)."""
    from matplotlib.figure import Figure

    numbers = bin_numbers(judged.confidence)
    counts = np.bincount(numbers, minlength=BINS)
    filled = counts > 0
    accuracy = np.bincount(numbers, weights=judged.correct, minlength=BINS)[filled] / counts[filled]
    confidence = np.bincount(numbers, weights=judged.confidence, minlength=BINS)[filled] / counts[filled]
    middles = (np.arange(BINS) + 0.5) / BINS
    figure = Figure(figsize=(4.6, 5.6), layout="constrained", dpi=120)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--", label="calibrated")
    top.bar(middles[filled], accuracy, width=0.94 / BINS, color="#4c78a8", label="accuracy")
    _gaps(top, middles[filled], accuracy, confidence)
    top.set_ylim(0, 1)
    top.set_xlim(0, 1)
    top.set_ylabel("accuracy")
    ece, brier = measures["expected_calibration_error"], measures["brier_score"]
    top.set_title(f"ECE {100 * ece:.1f} %, Brier score {brier:.3f}", fontsize=10)
    top.legend(loc="upper left", fontsize=8)
    bottom.bar(middles, counts / counts.sum(), width=0.94 / BINS, color="#9d9d9d")
    bottom.set_xlabel("confidence")
    bottom.set_ylabel("share of items")
    figure.savefig(path)


def _gaps(axes: Any, middles: Any, accuracy: Any, confidence: Any) -> None:
    """From each bin's accuracy to its mean confidence: what a calibrated model would not have."""
    bottom, height = np.minimum(accuracy, confidence), np.abs(confidence - accuracy)
    style = {"color": "#e45756", "alpha": 0.45, "hatch": "//", "edgecolor": "#e45756", "linewidth": 0}
    axes.bar(middles, height, bottom=bottom, width=0.94 / BINS, label="gap to confidence", **style)


def _short(name: str) -> str:
    """Names are of one line and of at most 24 characters; a dollar sign would begin a formula."""
    flat = " ".join(name.split()).replace("$", r"\$")
    return flat if len(flat) <= 24 else flat[:23] + "…"
