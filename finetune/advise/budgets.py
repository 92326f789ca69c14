"""Label budgets: how many labels a cell of the study may see, and which ones. Pure functions of a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.errors import UserError
from data.keyed import hash64
from finetune.settings import Settings
from finetune.splits import Indices, ranks, subset

STEPS = (1, 3)
"""Budgets of their own accord: 10, 30, 100, 300, …"""


def parse_budgets(words: Sequence[str]) -> list[int | None]:
    """Numbers of labels from words such as `10`, `1,000` or `all` (None); raises `UserError` for anything else."""
    budgets: list[int | None] = []
    for word in words:
        bare = word.strip().replace("_", "").replace(",", "")
        if bare == "all":
            budgets.append(None)
        elif bare.isdigit() and int(bare) > 0:
            budgets.append(int(bare))
        else:
            raise UserError(f"{word!r} is no label budget; write numbers of labels, or all: --budgets 10 100 1000 all")
    return budgets


def default_budgets(labels: Indices, per_class: bool) -> list[int | None]:
    """10, 30, 100, … (1, 3, 10, … a class) as far as the labels go, and all."""
    most = int(np.bincount(labels).max()) if per_class else len(labels)
    tens = [10**power for power in range(0 if per_class else 1, 9)]
    return [size * step for size in tens for step in STEPS if size * step < most] + [None]


def settle_budgets(
    labels: Indices, asked: Sequence[int | None] | None, per_class: bool
) -> tuple[dict[int, int | None], list[str]]:
    """The budgets that can be met, ascending, by their total number of labels; and a sentence on each that cannot.

    Args:
        labels: int64 (n,), class numbers of the training samples, every class present.
        asked: labels in total, or of each class where `per_class`; None stands for all; `default_budgets` without.

    Raises:
        UserError: none can be met.
    """
    classes, met, notes = int(labels.max()) + 1, {}, []
    for budget in asked or default_budgets(labels, per_class):
        if budget is not None and not per_class and budget < classes:
            notes.append(f"{budget} labels are too few: the task has {classes} classes, and each needs a label")
            continue
        total = len(take(labels, budget, 0, per_class))
        met[total] = None if total == len(labels) else budget
        if budget is not None and total == len(labels):
            notes.append(f"a budget of {budget:,} takes all {total:,} labels there are")
    if not met:
        raise UserError(f"{'; '.join(notes)}; give larger --budgets")
    return dict(sorted(met.items())), notes


def fitting(settings: Settings, labels: int) -> Settings:
    """The settings of a trained cell: a batch no larger than its labels, which larger ones would only repeat."""
    return settings.model_copy(update={"batch_size": min(settings.batch_size, max(2, labels))})


def take(labels: Indices, budget: int | None, seed: int, per_class: bool) -> Indices:
    """The positions that a budget may see, ascending: stratified, and nested for one seed.

    A total budget takes the first samples of one order in which every class comes once, and then in proportion
    to its size: a class of share p has within one label of `p * budget`, or one.
    """
    if per_class or budget is None:
        return subset(labels, budget, seed)
    draw = hash64(seed, 0x5B5E7, np.arange(len(labels), dtype=np.int64))
    place = ranks(labels, draw)
    # Halfway through its share of the class: the order in which classes of unequal size fill up evenly.
    due = np.where(place == 0, -1.0, (place + 0.5) / np.bincount(labels)[labels])
    return np.sort(np.lexsort((draw, due))[:budget])
