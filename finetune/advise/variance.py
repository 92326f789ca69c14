"""The spread of few seeds, steadied by that of all other cells: moderated variances.

Two or three seeds tell their own spread badly. The study has many such spreads that are alike, so each is shrunk
towards their common trend over the budgets, by as much as the spreads agree (Smyth 2004, "Linear models and
empirical Bayes methods", Statistical Applications in Genetics and Molecular Biology 3:1, sections 3 and 6.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import digamma, polygamma

MOST = 20.0
"""Degrees of freedom that the other cells lend at most."""
FEWEST = 6
"""Spreads from which a prior is made at least."""


@dataclass(frozen=True)
class Prior:
    """What the study's cells say about the variance over seeds at a budget; says nothing with 0 degrees of freedom."""

    freedom: float = 0.0
    slope: float = 0.0
    level: float = 0.0

    def moderated(self, variance: float, freedom: int, labels: int) -> tuple[float, float]:
        """A sample variance of so many degrees of freedom -> the shrunk one and its degrees of freedom."""
        expected = float(np.exp(self.level + self.slope * np.log(labels)))
        total = self.freedom + freedom
        return (self.freedom * expected + freedom * variance) / total, total


def fit_prior(spreads: Sequence[tuple[float, int, int]]) -> Prior:
    """From (sample variance, its degrees of freedom, labels); those of 0 have no chance in them."""
    kept = np.array([spread for spread in spreads if spread[0] > 1e-12])
    if len(kept) < FEWEST:
        return Prior()
    variance, freedom, labels = kept[:, 0], kept[:, 1], np.log(kept[:, 2])
    level = np.log(variance) - digamma(freedom / 2) + np.log(freedom / 2)
    degree = int(len(np.unique(labels)) > 1)
    slope, base = np.polyfit(labels, level, 1) if degree else (0.0, float(level.mean()))
    rest = level - slope * labels - base
    excess = float((rest**2).sum() / (len(rest) - 1 - degree) - polygamma(1, freedom / 2).mean())
    lent = 2 * _inverse_trigamma(excess) if excess > 0 else MOST
    lent = min(lent, MOST)
    # The mean of the log of a scaled F lies below the log of the scale by the prior's own chance.
    return Prior(lent, float(slope), float(base + digamma(lent / 2) - np.log(lent / 2)))


def _inverse_trigamma(value: float) -> float:
    """The y with trigamma(y) = value, by bisection of the logarithm."""
    low, high = -10.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if polygamma(1, np.exp(middle)) > value else (low, middle)
    return float(np.exp(low))
