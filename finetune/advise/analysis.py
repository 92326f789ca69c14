"""From finished cells to everything the study reports: curves, differences, multipliers, laws, a recommendation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import numpy as np

from finetune.advise.benefit import benefits
from finetune.advise.cells import Arm, Cell
from finetune.advise.curves import labels_to_reach, power_law
from finetune.advise.intervals import quantiles
from finetune.advise.recommend import recommend
from finetune.advise.rules import check_rules
from finetune.advise.table import Table


def analyse(
    cells: Sequence[Cell],
    arms: Sequence[Arm],
    alike: dict[str, Any] | None,
    targets: Sequence[float] | None,
    classes: int,
) -> dict[str, Any]:
    """All that follows from the cells, as JSON values; almost nothing where there are none."""
    about: dict[str, Any] = {"arms": [asdict(arm) | {"name": arm.name} for arm in arms], "similarity": alike}
    if not cells:
        none = "No cell was run; raise --minutes."
        return about | {"accuracy": [], "recommendation": {"arm": None, "benefit": None, "text": none}}
    table = Table(cells, arms)
    gains = benefits(table)
    advice = recommend(table, gains, 1 / classes)
    about |= {
        "trials": _trials(table),
        "accuracy": _accuracies(table),
        "differences": _differences(table),
        "benefit": gains,
        "multipliers": _multipliers(table),
        "targets": _targets(table, targets, 1 / classes),
        "power_laws": _laws(table, classes),
        "recommendation": advice,
    }
    return about | {"rules": check_rules(table, gains, alike)}


def number(value: float) -> float | None:
    """A finite number, or None: JSON has no infinity."""
    return value if math.isfinite(value) else None


def _accuracies(table: Table) -> list[dict[str, Any]]:
    rows = []
    for (arm, labels), found in table.accuracy.items():
        low, high = found.interval
        f1 = float(np.mean([c.macro_f1 for c in table.cells if c.arm == arm and c.labels == labels]))
        row = {"arm": arm, "labels": labels, "accuracy": found.value, "low": low, "high": high, "macro_f1": f1}
        rows.append(row | {"seeds": found.seeds, "seconds": round(table.seconds(arm, labels), 3)})
    return rows


def _differences(table: Table) -> list[dict[str, Any]]:
    rows = []
    for labels in table.budgets:
        for arm, other in combinations(table.arms, 2):
            found = table.difference(arm, other, labels)
            if found is not None:
                low, high = found.interval
                row = {"arm": arm.name, "against": other.name, "labels": labels, "difference": found.value}
                rows.append(row | {"low": low, "high": high, "seeds": found.seeds})
    return rows


def _multipliers(table: Table) -> list[dict[str, Any]]:
    """How many times as many labels training from scratch needs for the same accuracy."""
    against = table.measured("scratch")
    if len(against) < 2:
        return []
    labels = np.array(against, dtype=float)
    curve = np.stack([table.accuracy["scratch", n].draws for n in against], axis=1)
    middle = np.array([[table.accuracy["scratch", n].value for n in against]])
    rows = []
    for arm in (arm for arm in table.arms if arm.pretrained):
        for n in table.measured(arm.name):
            reached = table.accuracy[arm.name, n]
            value = labels_to_reach(labels, middle, np.array([reached.value]))[0] / n
            low, high = quantiles(labels_to_reach(labels, curve, reached.draws) / n)
            row = {"arm": arm.name, "labels": n, "multiplier": number(value), "low": number(low), "high": number(high)}
            rows.append(row | {"least": against[0] / n, "most": against[-1] / n})
    return rows


def _targets(table: Table, asked: Sequence[float] | None, chance: float) -> list[dict[str, Any]]:
    """Labels each arm needs to reach some accuracies; round ones between chance and the best without `asked`."""
    best = max(found.value for found in table.accuracy.values())
    step = 0.1 if best - chance > 0.3 else 0.05 if best - chance > 0.1 else 0.01
    first = math.floor(chance / step + 1) + 1
    levels = list(asked or (step * i for i in range(first, math.floor(best / step) + 1)))
    rows = []
    for arm in table.arms:
        budgets = table.measured(arm.name)
        if arm.strategy == "majority" or len(budgets) < 2:
            continue
        labels = np.array(budgets, dtype=float)
        curve = np.stack([table.accuracy[arm.name, n].draws for n in budgets], axis=1)
        middle = np.array([[table.accuracy[arm.name, n].value for n in budgets]])
        for level in levels:
            value = labels_to_reach(labels, middle, np.array([level]))[0]
            low, high = quantiles(labels_to_reach(labels, curve, np.full(len(curve), level)))
            row = {"arm": arm.name, "target": round(level, 6), "labels": number(value)}
            rows.append(row | {"low": number(low), "high": number(high), "least": budgets[0], "most": budgets[-1]})
    return rows


def _laws(table: Table, classes: int) -> list[dict[str, Any]]:
    rows = []
    for arm in table.arms:
        budgets = table.measured(arm.name)
        if arm.strategy == "majority" or not budgets:
            continue
        errors = 1 - np.array([table.accuracy[arm.name, n].value for n in budgets])
        draws = 1 - np.stack([table.accuracy[arm.name, n].draws for n in budgets], axis=1)
        law = power_law(np.array(budgets, dtype=float), errors, draws, 1 - 1 / classes)
        rows.append({"arm": arm.name} | asdict(law))
    return rows


def _trials(table: Table) -> dict[str, dict[str, Any]]:
    """How many settings each arm chose among, at most, and how often there were too few labels to choose."""
    found: dict[str, dict[str, Any]] = {}
    for arm in table.arms:
        mine = [cell for cell in table.cells if cell.arm == arm.name]
        counts = [len(cell.chosen.get("inner_accuracy", ())) for cell in mine]
        if not any(counts):
            continue
        without = sorted({cell.labels for cell, count in zip(mine, counts, strict=True) if not count})
        found[arm.name] = {"learning_rates": max(counts), "none_at": without}
    return found
