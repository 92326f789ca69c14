"""How good, and how sure: accuracy with its interval, macro-F1, and what several seeds say together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054
"""The normal distribution's 97.5 % quantile: intervals cover 95 %."""


@dataclass(frozen=True)
class Score:
    """One model on one test set."""

    predictions: NDArray[np.int64]
    """(n,) predicted classes."""
    correct: NDArray[np.bool_]
    """(n,) whether each is right."""
    accuracy: float
    """Share of correct predictions, in [0, 1]."""
    interval: tuple[float, float]
    """95 % Wilson interval of the accuracy over test items."""
    macro_f1: float
    """Mean over the classes of the F1 score; a class that is neither present nor predicted is left out."""


def score(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> Score:
    """Compare predictions (n, classes) with labels (n,); the first of equal probabilities wins."""
    predictions = probabilities.argmax(axis=1).astype(np.int64)
    correct = predictions == labels
    return Score(
        predictions=predictions,
        correct=correct,
        accuracy=float(correct.mean()),
        interval=wilson(int(correct.sum()), len(labels)),
        macro_f1=macro_f1(predictions, labels),
    )


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927): sound for few trials and near 0 and 1."""
    share = successes / trials
    centre = share + _Z**2 / (2 * trials)
    spread = _Z * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    scale = 1 + _Z**2 / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def macro_f1(predictions: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """The classes' F1 scores 2·hits / (predicted + present), averaged with equal weight."""
    classes = int(max(predictions.max(), labels.max())) + 1
    hits = np.bincount(labels[predictions == labels], minlength=classes)
    total = np.bincount(predictions, minlength=classes) + np.bincount(labels, minlength=classes)
    return float((2 * hits[total > 0] / total[total > 0]).mean())


def interval(correct: NDArray[np.bool_], resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean accuracy of several seeds: `correct` is (seeds, items).

    One seed has Wilson's interval. Several are resampled with the items (both drawn with replacement,
    the same items for every seed), so that the interval holds the chance in both.
    """
    seeds, items = correct.shape
    if seeds == 1:
        return wilson(int(correct.sum()), items)
    # Raw bits of a fixed Philox stream: the same numbers under every version of NumPy.
    stream = np.random.Philox(key=0)
    means = np.empty(resamples)
    for i in range(resamples):
        bits = stream.random_raw(seeds + items)
        mean_of_items = correct[bits[:seeds] % np.uint64(seeds)].mean(axis=0)
        means[i] = mean_of_items[bits[seeds:] % np.uint64(items)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
