"""How sure: 95 % intervals over test items and seeds, paired wherever two ways are compared.

Test items are resampled with replacement, the same for every cell (so that differences are paired). Seeds are
few: resampling three of them with replacement gives intervals that are far too short. Their part is drawn from
Student's t instead, from the same draws for every way (a hierarchical bootstrap with a parametric upper level; see
Davison and Hinkley 1997, section 3.8), with a variance and degrees of freedom that borrow from the study's other
cells (see `variance`). One seed has no such part: its intervals hold the chance in the test items only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincinv, ndtri

from finetune.advise.cells import Cell
from finetune.advise.variance import Prior, fit_prior

Floats = NDArray[np.float64]
RESAMPLES = 2000
_CHUNK = 2**22
"""Resampled items held at once."""


@dataclass(frozen=True)
class Estimate:
    """A number and what it might have been."""

    value: float
    draws: Floats
    """(resamples,), the k-th from the same resampled items and seeds in every estimate."""
    seeds: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 %."""
        return quantiles(self.draws)


def quantiles(draws: Floats) -> tuple[float, float]:
    """The central 95 % of draws (n,), which may be infinite."""
    low, high = np.quantile(draws, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


class Evidence:
    """All cells of a study, resampled together."""

    def __init__(self, cells: Sequence[Cell], resamples: int = RESAMPLES) -> None:
        """Every cell must be about the same test items."""
        self._points = {cell.key: cell.accuracy for cell in cells}
        stream = np.random.Philox(key=0xAD715E)
        drawn = _resampled(np.stack([cell.correct for cell in cells]), resamples, stream)
        self._draws = dict(zip(self._points, drawn, strict=True))
        self.seeds = sorted({cell.seed for cell in cells})
        uniform = _uniform(stream, resamples * (len(self.seeds) + 1)).reshape(-1, resamples)
        self._normal = dict(zip(self.seeds, ndtri(uniform[1:]), strict=True))
        self._spread = uniform[0]
        self._own, self._paired = self._priors()

    def seeds_of(self, *arms: str, labels: int) -> list[int]:
        """The seeds with which all these arms were run on that many labels."""
        return [seed for seed in self.seeds if all((arm, labels, seed) in self._points for arm in arms)]

    def accuracy(self, arm: str, labels: int) -> Estimate | None:
        """Mean accuracy over the seeds; None where no cell was run."""
        seeds = self.seeds_of(arm, labels=labels)
        keys = [(arm, labels, seed) for seed in seeds]
        if not keys:
            return None
        points, draws = np.array([self._points[key] for key in keys]), np.stack([self._draws[key] for key in keys])
        found = self._joined(points, draws, seeds, labels, self._own)
        return Estimate(found.value, found.draws.clip(0.0, 1.0), found.seeds)

    def _priors(self) -> tuple[Prior, Prior]:
        """Of the spreads over seeds of all accuracies, and of all differences at the same budget."""
        groups: dict[int, dict[str, dict[int, float]]] = {}
        for (arm, labels, seed), accuracy in self._points.items():
            groups.setdefault(labels, {}).setdefault(arm, {})[seed] = accuracy
        own, paired = [], []
        for labels, arms in groups.items():
            own += [_variance(list(seeds.values()), labels) for seeds in arms.values()]
            for one, two in combinations(arms.values(), 2):
                paired.append(_variance([one[seed] - two[seed] for seed in one if seed in two], labels))
        return fit_prior(own), fit_prior(paired)

    def difference(self, arm: str, other: str, labels: int, another_draw: bool = False) -> Estimate | None:
        """Mean accuracy of `arm` minus that of `other`, over the seeds that both have: paired by seed and item.

        Args:
            another_draw: `other` draws something anew with each seed of which `arm` has one draw (untrained
                weights); then the question is whether `arm` could be one more such draw, whose chance counts too.
        """
        seeds = self.seeds_of(arm, other, labels=labels)
        pairs = [((arm, labels, seed), (other, labels, seed)) for seed in seeds]
        if not pairs:
            return None
        points = np.array([self._points[one] - self._points[two] for one, two in pairs])
        draws = np.stack([self._draws[one] - self._draws[two] for one, two in pairs])
        found = self._joined(points, draws, seeds, labels, self._paired, another_draw)
        return Estimate(found.value, found.draws.clip(-1.0, 1.0), found.seeds)

    def _joined(
        self, points: Floats, draws: Floats, seeds: list[int], labels: int, prior: Prior, another: bool = False
    ) -> Estimate:
        """Resampled items, averaged over the seeds (seeds, resamples), and the seeds' own chance on top."""
        count, mean = len(points), float(points.mean())
        joined, variance = draws.mean(axis=0), float(points.var(ddof=1)) if count > 1 else 0.0
        if variance > 1e-12:
            steadied, freedom = prior.moderated(variance, count - 1, labels)
            # The shared normal draws keep what differs with the seed together in all ways; over the root of a
            # chi-square they are Student's t.
            deviations = sum(self._normal[s] * (x - mean) for s, x in zip(seeds, points, strict=True))
            chi = 2 * gammaincinv(freedom / 2, self._spread)
            scale = np.sqrt(steadied / variance * freedom / chi / (count * (count - 1)))
            joined = joined + deviations * scale * (np.sqrt(count + 1.0) if another else 1.0)
        return Estimate(mean, joined, count)


def _variance(values: list[float], labels: int) -> tuple[float, int, int]:
    """Sample variance, its degrees of freedom, labels; 0 where there is none."""
    return (float(np.var(values, ddof=1)), len(values) - 1, labels) if len(values) > 1 else (0.0, 0, labels)


def _resampled(correct: NDArray[np.bool_], resamples: int, stream: np.random.Philox) -> Floats:
    """Accuracies (cells, resamples) of cells (cells, items) on test items drawn with replacement."""
    items = correct.shape[1]
    values, done = correct.T.astype(np.float32), []
    size = max(1, _CHUNK // items)
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        # Raw bits of a fixed Philox stream: the same numbers under every version of NumPy.
        chosen = (stream.random_raw(count * items) % np.uint64(items)).astype(np.int64)
        rows = np.repeat(np.arange(count), items) * items
        weights = np.bincount(rows + chosen, minlength=count * items).reshape(count, items)
        done.append(weights.astype(np.float32) @ values)
    return np.concatenate(done).astype(np.float64).T / items


def _uniform(stream: np.random.Philox, count: int) -> Floats:
    """Numbers strictly between 0 and 1."""
    return ((stream.random_raw(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
