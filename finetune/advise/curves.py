"""What curves of accuracy against labels say: labels needed, label multipliers, and a power law of the error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

from finetune.advise.intervals import quantiles

Floats = NDArray[np.float64]
EXPONENTS = np.geomspace(0.02, 2.0, 120)
"""Exponents tried; measured ones lie between 0.07 and 0.5 (Hestness et al. 2017, arXiv 1712.00409)."""
FEWEST = 5
"""Budgets that a law of three numbers is fitted to at least."""
AHEAD = (3, 10)
"""How many times the largest budget errors are foretold for."""
WIDEST = 0.2
"""A foretold error whose interval is wider than this says nothing."""


def isotonic(accuracy: Floats) -> Floats:
    """The nearest curves that never fall, (…, k): more labels of the same kind do no harm, but noise may."""
    count = accuracy.shape[-1]
    sums = np.concatenate([np.zeros_like(accuracy[..., :1]), accuracy.cumsum(axis=-1)], axis=-1)
    # The min-max formula of isotonic regression (Robertson, Wright and Dykstra 1988, section 1.4).
    result = np.empty_like(accuracy)
    for i in range(count):
        best = np.full(accuracy.shape[:-1], -np.inf)
        for start in range(i + 1):
            means = [(sums[..., stop] - sums[..., start]) / (stop - start) for stop in range(i + 1, count + 1)]
            best = np.maximum(best, np.minimum.reduce(means))
        result[..., i] = best
    return result


def labels_to_reach(labels: Floats, accuracy: Floats, target: Floats) -> Floats:
    """Labels at which curves (n, k) over `labels` (k,) first reach `target` (n,), linear in log labels.

    `labels[0]` where the first point is there already, infinity where the last one is not.
    """
    curve, logs = isotonic(accuracy), np.log(labels)
    there = curve >= target[:, None]
    first = there.argmax(axis=1)
    rows, before = np.arange(len(curve)), (first - 1).clip(0)
    low, high = curve[rows, before], curve[rows, first]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(high > low, (target - low) / (high - low), 1.0).clip(0.0, 1.0)
    found = np.exp(logs[before] + share * (logs[first] - logs[before]))
    return np.where(~there.any(axis=1), np.inf, np.where(first == 0, labels[0], found))


@dataclass(frozen=True)
class PowerLaw:
    """`error = amplitude * labels ** -exponent + floor`, with 95 % intervals; or why there is none."""

    reason: str = ""
    """Empty where the law could be fitted."""
    exponent: tuple[float, float, float] | None = None
    """Value, low, high."""
    floor: tuple[float, float, float] | None = None
    foretold: list[dict[str, float]] = field(default_factory=list)
    """`labels`, `error`, `low` and `high` beyond the largest budget."""


def power_law(labels: Floats, errors: Floats, draws: Floats, chance: float) -> PowerLaw:
    """Fit the errors (k,) and every one of their draws (n, k), weighted by the draws' spread.

    Budgets at which the error is not clearly below `chance` (that of guessing) are left out: there the law has
    not begun. The intervals are those of the fits to the draws. They hold if the law goes on as it was.
    """
    spread = (np.quantile(draws, 0.84, axis=0) - np.quantile(draws, 0.16, axis=0)) / 2
    begun = errors + 2 * spread < chance - 0.05 * chance
    labels, errors, draws, spread = labels[begun], errors[begun], draws[:, begun], spread[begun].clip(1e-4)
    if len(labels) < FEWEST:
        return PowerLaw(f"{len(labels)} budgets with errors clearly below chance; it takes {FEWEST}")
    best, amplitude, exponent, floor = fit(labels, errors[None], spread)
    if chi2.sf(best[0], len(labels) - 3) < 0.01:
        return PowerLaw("the errors do not follow a power law")
    _, amplitudes, exponents, floors = fit(labels, draws, spread)
    fall = amplitudes * labels[0] ** -exponents - amplitudes * labels[-1] ** -exponents
    if np.quantile(fall, 0.025) <= 0.01:
        return PowerLaw("the error does not fall measurably with more labels")
    foretold = []
    for times in AHEAD:
        more = times * float(labels[-1])
        low, high = quantiles(amplitudes * more**-exponents + floors)
        error = float(amplitude[0] * more ** -exponent[0] + floor[0])
        foretold.append({"labels": more, "error": error, "low": low, "high": high})
    if foretold[-1]["high"] - foretold[-1]["low"] > WIDEST:
        return PowerLaw(f"the intervals are too wide: an error between {low:.2f} and {high:.2f} at {more:,.0f} labels")
    return PowerLaw(
        exponent=(float(exponent[0]), *quantiles(exponents)),
        floor=(float(floor[0]), *quantiles(floors)),
        foretold=foretold,
    )


def fit(labels: Floats, errors: Floats, spread: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Weighted least squares of errors (n, k): (residual chi-square, amplitude, exponent, floor), each (n,).

    For each exponent the other two follow linearly, the floor not below 0.
    """
    weight = spread**-2
    best = np.full((4, len(errors)), math.inf)
    for exponent in EXPONENTS:
        basis = labels**-exponent
        centre, mean = (weight * basis).sum() / weight.sum(), (errors * weight).sum(axis=1) / weight.sum()
        variance = (weight * (basis - centre) ** 2).sum()
        amplitude = ((errors - mean[:, None]) * (weight * (basis - centre))).sum(axis=1) / variance
        floor = mean - amplitude * centre
        without = (errors * (weight * basis)).sum(axis=1) / (weight * basis**2).sum()
        amplitude, floor = np.where(floor < 0, without, amplitude), floor.clip(0.0)
        chi = ((errors - amplitude[:, None] * basis - floor[:, None]) ** 2 * weight).sum(axis=1)
        better = chi < best[0]
        best[:, better] = np.stack([chi, amplitude, np.full_like(chi, exponent), floor])[:, better]
    return best[0], best[1], best[2], best[3]
