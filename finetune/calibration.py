"""Whether probabilities mean what they say: calibration error, Brier score, and temperature scaling."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BINS = 15
"""Of the calibration errors and the reliability diagram (Guo et al. 2017, section 3)."""
TEMPERATURES = (0.01, 100.0)
"""A fitted temperature lies between these; at an end the logits say nothing, or are never wrong."""


def bin_numbers(confidence: Floats, bins: int = BINS) -> Ints:
    """Number of the equal-width bin of each confidence (n,): bin m holds (m / bins, (m + 1) / bins]."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def expected_calibration_error(confidence: Floats, correct: NDArray[np.bool_], bins: int = BINS) -> float:
    """Mean over the items of |accuracy - confidence| of their equal-width bin (Guo et al. 2017, eq. 3).

    Args:
        confidence: (n,) probability of the predicted class, in [0, 1].
        correct: (n,) whether the prediction is right.
    """
    gaps = np.bincount(bin_numbers(confidence, bins), weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def adaptive_calibration_error(confidence: Floats, correct: NDArray[np.bool_], bins: int = BINS) -> float:
    """The same with bins of (nearly) equal counts (Nguyen & O'Connor 2015), whatever the confidences' spread."""
    order = np.argsort(confidence, kind="stable")
    gaps = (correct - confidence)[order]
    parts = np.array_split(gaps, min(bins, len(gaps)))
    return float(sum(abs(part.sum()) for part in parts) / len(gaps))


def squared_errors(probabilities: NDArray[np.floating], labels: Ints) -> Floats:
    """Brier score of each item (n,): squared distance from the true class's unit vector, in [0, 2] (Brier 1950)."""
    wide = probabilities.astype(np.float64)
    own = wide[np.arange(len(labels)), labels]
    return (wide**2).sum(axis=1) - 2 * own + 1.0


def log_losses(probabilities: NDArray[np.floating], labels: Ints) -> Floats:
    """Negative log-likelihood of each item (n,), in nats; probabilities count as 1e-12 at least."""
    own: Floats = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return -np.log(np.maximum(own, 1e-12))


def fit_temperature(logits: NDArray[np.floating], labels: Ints) -> float:
    """The temperature T with the least mean log loss of softmax(logits / T) (Guo et al. 2017, section 4.2).

    The loss is convex in 1 / T: its slope, the mean of (expected logit - true logit), only rises, and bisection
    finds where it is zero. `logits` (n, classes) may hold -inf (a neighbour head's classes without a vote); an
    item whose own class has none says nothing about T and is left out.
    """
    wide = logits.astype(np.float64)
    own = wide[np.arange(len(labels)), labels]
    known = np.isfinite(own)
    shifted = wide[known] - own[known, None]
    if not known.any() or not np.isfinite(shifted).any():
        return 1.0
    finite = np.where(np.isfinite(shifted), shifted, 0.0)
    low, high = (float(np.log(bound)) for bound in TEMPERATURES)
    for _ in range(50):
        middle = (low + high) / 2
        scaled = shifted * np.exp(-middle)
        weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        slope = float(((weights * finite).sum(axis=1) / weights.sum(axis=1)).mean())
        # Where the loss falls as 1 / T grows, T is too large.
        low, high = (low, middle) if slope < 0 else (middle, high)
    return float(np.exp((low + high) / 2))
