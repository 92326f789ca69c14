"""Budgets nest and are stratified; inner folds and held-out shares partition; seeds decide."""

import numpy as np
import pytest

from data.keyed import hash64
from finetune.splits import folds, held_out, subset

LABELS = np.array([0] * 50 + [1] * 20 + [2] * 7 + [-1] * 5 + [3])[np.argsort(hash64(9, np.arange(83)))]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_budgets_nest_and_are_stratified(seed: int) -> None:
    smaller = np.empty(0, dtype=np.int64)
    for budget in (1, 3, 10, 30):
        chosen = subset(LABELS, budget, seed)
        assert set(smaller) <= set(chosen)
        counts = np.bincount(LABELS[chosen], minlength=4)
        assert list(counts) == [min(budget, have) for have in (50, 20, 7, 1)]
        assert (np.diff(chosen) > 0).all()
        smaller = chosen


def test_seeds_draw_different_labels_and_one_seed_the_same() -> None:
    assert (subset(LABELS, 5, 0) == subset(LABELS, 5, 0)).all()
    assert len(np.setdiff1d(subset(LABELS, 5, 0), subset(LABELS, 5, 1)))


def test_no_budget_takes_every_labelled_sample() -> None:
    assert (subset(LABELS, None, 0) == np.flatnonzero(LABELS >= 0)).all()


def test_folds_are_stratified_and_singletons_always_train() -> None:
    labels = LABELS[LABELS >= 0]
    number = folds(labels, 4, seed=0)
    assert (number[labels == 3] == -1).all()
    for label in (0, 1, 2):
        counts = np.bincount(number[labels == label], minlength=4)
        assert counts.max() - counts.min() <= 1


def test_held_out_share_depends_on_hashes_alone() -> None:
    labels = LABELS[LABELS >= 0]
    hashes = hash64(1, np.arange(len(labels)))
    out = held_out(labels, 0.2, hashes)
    assert list(np.bincount(labels[out], minlength=4)) == [10, 4, 1, 0]
    order = np.argsort(hash64(2, np.arange(len(labels))))
    assert (held_out(labels[order], 0.2, hashes[order]) == out[order]).all()
