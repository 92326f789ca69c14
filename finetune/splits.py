"""Which labels a strategy may see: budgets, inner splits and held-out shares. Pure functions of a seed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.keyed import hash64

Indices = NDArray[np.int64]


def subset(labels: Indices, per_class: int | None, seed: int) -> Indices:
    """The positions of `per_class` samples of each class, ascending; every sample where it is None.

    Each class has one random order for a seed and a budget takes its first samples, so budgets nest:
    the ten labels of a class are among its thirty. A class with fewer samples gives all it has.
    Unlabelled samples (-1) are never taken.
    """
    labelled = labels >= 0
    if per_class is None:
        return np.flatnonzero(labelled)
    return np.flatnonzero(labelled & (ranks(labels, hash64(seed, 0x5B5E7, _positions(labels))) < per_class))


def folds(labels: Indices, count: int, seed: int) -> Indices:
    """A fold number in [0, count) for each sample, stratified; -1 where a class has a single sample.

    Samples of fold -1 always train: held out, nobody could have learned their class.
    """
    number = ranks(labels, hash64(seed, 0xF01D5, _positions(labels)))
    singles = np.bincount(labels)[labels] == 1
    # Starting each class at another fold spreads small classes over the folds.
    return np.where(singles, -1, (number + labels) % count)


def held_out(labels: Indices, share: float, hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """True for about `share` of each class, at least one sample where a class has two: the lowest hashes.

    A sample's place depends on its own hash alone (and on how many its class has), not on any seed, so
    that every run holds out the same test set.
    """
    sizes = np.bincount(labels)
    quota = np.where(sizes > 1, np.clip(np.round(sizes * share), 1, None), 0)
    return ranks(labels, hashes) < quota[labels]


def _positions(labels: Indices) -> Indices:
    return np.arange(len(labels), dtype=np.int64)


def ranks(labels: Indices, numbers: NDArray[np.uint64]) -> Indices:
    """Each sample's rank within its class, by `numbers` and then by position."""
    order = np.lexsort((numbers, labels))
    grouped = labels[order]
    starts = np.flatnonzero(np.r_[True, grouped[1:] != grouped[:-1]])
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - np.repeat(starts, np.diff(np.r_[starts, len(labels)]))
    return ranks
