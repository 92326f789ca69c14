"""The robustness curve of models between two: their merit on the test set against that on shifted sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from data.files import write_atomically
from finetune.targets import SCORES

_COLORS = ("#1f6feb", "#d9730d", "#2da44e", "#8250df", "#bf3989", "#7d8590")


def draw(results: dict[str, Any], out: Path) -> None:
    """Write what `finetune.interpolate` found as a PNG.

    Right: one curve a shifted set, from the probe to the fine-tuned model (figure 1 of Wortsman et al. 2022), drawn
    where there are test and shifted data. Left: the merit on each set along alpha.
    """
    sets = [name for name in results["data"] if name != "validation"]
    shifted = [name for name in sets if name != "test"]
    both = "test" in sets and bool(shifted)
    figure, axes = plt.subplots(
        1, 1 + both, figsize=(6.2 * (1 + both), 4.6), dpi=110, layout="constrained", squeeze=False
    )
    _along(axes[0][0], results)
    if both:
        _against(axes[0][1], results, shifted)
    ends = results["ends"]
    figure.suptitle(f"from {ends['0']} (alpha 0) to {ends['1']} (alpha 1)", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    plt.close(figure)
    write_atomically(out, picture.getvalue())


def _along(axes: Axes, results: dict[str, Any]) -> None:
    curve, (called, unit, times) = results["curve"], _scale(results)
    for number, name in enumerate(results["data"]):
        chosen_on = name == "validation"
        axes.plot(
            [point["alpha"] for point in curve],
            [times * point[name] for point in curve],
            marker=".",
            label=name,
            linestyle="--" if chosen_on else "-",
            color="black" if chosen_on else _color(number),
        )
    why = "chosen on validation data" if results["chosen_on_validation"] else "without validation data"
    axes.axvline(results["alpha"], color="#7d8590", linewidth=1, label=f"alpha {results['alpha']:g}, {why}")
    axes.set_xlabel("alpha")
    axes.set_ylabel(f"{called}{unit}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)


def _against(axes: Axes, results: dict[str, Any], shifted: list[str]) -> None:
    curve, (called, unit, times) = results["curve"], _scale(results)
    merit, names = results.get("merit", "accuracy"), list(results["data"])
    for name in shifted:
        color = _color(names.index(name))
        x, y = ([times * point[each] for point in curve] for each in ("test", name))
        axes.plot(x, y, marker=".", color=color, label=name)
        for place, marker in ((0, "s"), (-1, "o")):
            axes.plot(x[place], y[place], marker=marker, color=color, markersize=9)
        star = [times * results["leads"][each][merit] for each in ("test", name)]
        axes.plot(*star, marker="*", color=color, markersize=15)
    axes.set_xlabel(f"{called} on the test set{unit}")
    axes.set_ylabel(f"{called} on shifted data{unit}")
    axes.set_title("square: alpha 0, circle: alpha 1, star: chosen", fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)


def _scale(results: dict[str, Any]) -> tuple[str, str, float]:
    """What the merit is called, its unit, and what it is multiplied by: accuracy is shown in per cent."""
    merit = results.get("merit", "accuracy")
    return (SCORES[merit], ", %", 100.0) if merit == "accuracy" else (SCORES[merit], "", 1.0)


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]
