"""Whether pre-training helped: the best way with it against the best without, honest about having picked the best."""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.advise.table import Table


def benefits(table: Table) -> list[dict[str, Any]]:
    """For each budget the best pre-trained arm minus the best control, with a 95 % interval that allows for the choice.

    The lower end is that of White's reality check (Econometrica 2000): with the largest of all centred, scaled
    differences as the yardstick, over arms *and* budgets, no arm that is in truth no better passes in 95 % of
    studies, however many were looked at. `helps` is that lower end above 0, `harms` the upper end below 0, and
    neither is said of one seed.
    """
    controls = [arm for arm in table.arms if not arm.pretrained]
    found = []
    for labels in table.budgets:
        here = [arm for arm in controls if (arm.name, labels) in table.accuracy]
        if not any(arm.strategy != "majority" for arm in here):
            continue
        most = max(table.accuracy[arm.name, labels].seeds for arm in here)
        here = [arm for arm in here if table.accuracy[arm.name, labels].seeds > 1 or most == 1]
        control = max(here, key=lambda arm: table.accuracy[arm.name, labels].value)
        pairs = ((arm, table.difference(arm, control, labels)) for arm in table.arms if arm.pretrained)
        known = [(arm, pair) for arm, pair in pairs if pair is not None]
        # One seed says nothing of the chance in the draw, so it is looked at only where there is no other.
        found.append((labels, control, [each for each in known if each[1].seeds > 1] or known))
    every = [pair for _, _, pairs in found for _, pair in pairs]
    if not every:
        return []
    scales = {id(pair): _scale(pair.draws) for pair in every}
    centred = np.stack([(pair.draws - pair.value) / scales[id(pair)] for pair in every])
    above = float(np.quantile(centred.max(axis=0), 0.975))
    below = float(np.quantile((-centred).max(axis=0), 0.975))
    rows = []
    for labels, control, measured in found:
        if not measured:
            continue
        arm, pair = max(measured, key=lambda each: each[1].value)
        # Every arm's own bounds hold at once, so the best lower one is a lower bound for the best.
        low = max(each.value - above * scales[id(each)] for _, each in measured)
        high = max(each.value + below * scales[id(each)] for _, each in measured)
        several = pair.seeds > 1
        row = {"labels": labels, "arm": arm.name, "against": control.name, "difference": pair.value}
        row["seeds"] = pair.seeds
        rows.append(row | {"low": low, "high": high, "helps": low > 0 and several, "harms": high < 0 and several})
    return rows


def _scale(draws: np.ndarray) -> float:
    """Half the width of the central 95 %: t's far tails make a standard deviation meaningless."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return max(float(high - low) / 2, 1e-6)
