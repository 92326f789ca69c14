"""Differences between models on the same items, with paired intervals by bootstrap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.judge import RESAMPLES
from finetune.targets import Floats, Target

Correct = NDArray[np.bool_]
_COUNTS = 2**22
"""Of items in draws, that are held at once."""


def lead(correct: Correct, reference: Correct, resamples: int = RESAMPLES) -> dict[str, Any]:
    """How much more often one is right than the other, on the same items: the mean and its paired 95 % interval.

    Both are (seeds, items). Items are drawn with replacement, the same for both; so are seeds where there are
    several, in pairs. One seed's interval therefore covers the chance in the items alone.
    """
    difference = correct.astype(np.float64) - reference.astype(np.float64)
    means = []
    for seeds, items in _draws(difference.shape[0], difference.shape[1], resamples):
        rows = difference if len(difference) == 1 else difference[seeds]
        means.append(rows.mean(axis=0)[items].mean())
    return _with_interval(float(difference.mean()), means)


def merit_lead(target: Target, ours: Floats, theirs: Floats, resamples: int = RESAMPLES) -> dict[str, Any]:
    """The same of any target's merit, from both sides' `Target.sums` (seeds, items, k); the same draws."""

    count, means = ours.shape[1], []
    draws = _draws(ours.shape[0], count, resamples)
    while part := list(islice(draws, max(1, _COUNTS // count))):
        times = np.stack([np.bincount(items.astype(np.int64), minlength=count) for _, items in part])
        found = _differences(target, times.astype(np.float64), ours, theirs)
        means += [row[seeds].mean() for row, (seeds, _) in zip(found, part, strict=True)]
    return _with_interval(float(_differences(target, np.ones((1, count)), ours, theirs).mean()), means)


def _differences(target: Target, times: Floats, ours: Floats, theirs: Floats) -> Floats:
    """(draws, seeds): differences of merits where each item counts as often as `times` (draws, items) says."""
    return (target.from_sums(times @ ours) - target.from_sums(times @ theirs)).T


def _draws(seeds: int, items: int, resamples: int) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
    """Seeds and items drawn with replacement."""
    # Raw bits of a fixed Philox stream: the same numbers under every version of NumPy.
    stream = np.random.Philox(key=1)
    for _ in range(resamples):
        bits = stream.random_raw(seeds + items)
        yield bits[:seeds] % np.uint64(seeds), bits[seeds:] % np.uint64(items)


def _with_interval(difference: float, means: Sequence[float]) -> dict[str, Any]:
    low, high = np.quantile(means, [0.025, 0.975])
    return {"difference": difference, "interval": [float(low), float(high)]}
