"""The quickstart's picture: loss, accuracy against labels, and what the model sees."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.gridspec import GridSpecFromSubplotSpec

from pretrain.metrics import read_metrics

if TYPE_CHECKING:
    from launch.quickstart import Curve, Kind

BLUE, ORANGE, GREY = "#1f6feb", "#d9730d", "#7d8590"
_STYLES: dict[str, dict[str, Any]] = {
    "pre-trained, linear probe": {"color": BLUE, "linewidth": 2.2, "marker": "o"},
    "pre-trained, full fine-tuning": {"color": BLUE, "linewidth": 2.2, "marker": "s", "linestyle": "--"},
    "from scratch": {"color": ORANGE, "linewidth": 1.6, "marker": "s", "linestyle": "--"},
    "untrained encoder": {"color": GREY, "linewidth": 1.6, "marker": "o"},
    "raw pixels": {"color": "black", "linewidth": 1.2, "marker": ".", "linestyle": ":"},
    "bag of tokens": {"color": "black", "linewidth": 1.2, "marker": ".", "linestyle": ":"},
}
_PICTURES = 4


def draw(
    kind: Kind,
    export: Path,
    run: Path,
    test: Path,
    curves: list[Curve],
    killed_at: int,
    verdict: str,
    out: Path,
) -> None:
    """Write the picture as a PNG."""
    figure = plt.figure(figsize=(15, 5), dpi=110, layout="constrained")
    left, middle, right = figure.add_gridspec(1, 3, width_ratios=[1, 1.15, 1.1])
    _loss(figure.add_subplot(left), run, killed_at)
    _accuracy(figure.add_subplot(middle), curves)
    if kind == "images":
        _reconstructions(figure, right, export, test)
    else:
        _sample(figure.add_subplot(right), export)
    figure.suptitle("\n".join(textwrap.wrap(verdict[0].upper() + verdict[1:], 185)), fontsize=10)
    figure.savefig(out)
    plt.close(figure)


def _loss(axes: Axes, run: Path, killed_at: int) -> None:
    lines = [line for line in read_metrics(run) if "loss" in line]
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], color=BLUE)
    axes.axvline(killed_at, color=ORANGE, linestyle=":")
    axes.annotate(
        "killed, resumed",
        (killed_at, axes.get_ylim()[1]),
        xytext=(4, -12),
        textcoords="offset points",
        color=ORANGE,
    )
    axes.set(title="Pre-training", xlabel="step", ylabel="loss")
    _tidy(axes)


def _accuracy(axes: Axes, curves: list[Curve]) -> None:
    from launch.quickstart import BUDGETS

    for curve in curves:
        style = _STYLES[curve.name]
        axes.plot(BUDGETS, [100 * a for a in curve.accuracy], label=curve.name, **style)
        bounds = [100 * a for a in curve.low], [100 * a for a in curve.high]
        axes.fill_between(BUDGETS, *bounds, color=style["color"], alpha=0.08, linewidth=0)
    axes.set(
        title="Fine-tuning (bands: 95 % intervals)",
        xlabel="labels a class",
        ylabel="test accuracy, %",
        xscale="log",
    )
    axes.set_xticks(BUDGETS, [str(n) for n in BUDGETS])
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    _tidy(axes)


def _reconstructions(figure: Any, place: Any, export: Path, test: Path) -> None:
    from data.dataset import ShardedDataset
    from data.loader import sequential
    from pretrain.objectives.masked_image import MaskedAutoencoder
    from pretrain.reload import load_objective

    objective, recipe = load_objective(export)
    assert isinstance(objective, MaskedAutoencoder)
    dataset = ShardedDataset(test)
    firsts = np.sort(np.unique(dataset.labels(), return_index=True)[1])  # the first picture of each class
    batch = next(sequential(dataset, _PICTURES, canvas=recipe.data.canvas, ids=firsts[:_PICTURES]))
    rows = objective.reconstruct(batch)
    grid = GridSpecFromSubplotSpec(3, _PICTURES, place, wspace=0.05, hspace=0.08)
    names = ("test picture", f"{objective.config.mask_ratio:.0%} hidden", "what MAE fills in")
    for row, (name, images) in enumerate(zip(names, rows, strict=True)):
        for column in range(_PICTURES):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(images[column].permute(1, 2, 0).numpy(), interpolation="nearest", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            for side in axes.spines.values():
                side.set_visible(False)
            if column == 0:
                axes.set_ylabel(name, fontsize=9)
            if row == column == 0:
                axes.set_title("What the model sees", loc="left").set_in_layout(False)
            if row == 2 and column == 0:
                note = "each hidden patch's mean and contrast are given"
                label = axes.text(0, -0.06, note, transform=axes.transAxes, fontsize=8, va="top")
                label.set_in_layout(False)


def _sample(axes: Axes, export: Path) -> None:
    from data.tokenizer import load
    from pretrain.generate import generate
    from pretrain.objectives.next_token import NextToken
    from pretrain.reload import load_objective

    objective, _ = load_objective(export)
    assert isinstance(objective, NextToken)
    prompt = "def read(self, path):\n"
    text = generate(objective, load(export), prompt, tokens=110, temperature=0.6, top_k=20, seed=1)
    lines = [line[:52] for line in text.expandtabs(4).splitlines()][:22]
    axes.text(0, 1, "\n".join(lines).replace("$", r"\$"), family="monospace", fontsize=8, va="top")
    axes.set_title("What the model writes (its prompt is the first line)")
    axes.axis("off")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
