"""Whether a step may count: numbers that are not finite, and losses far above the recent ones."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

_ENOUGH = 0.5
"""Share of the window that must be filled before a loss can be called a spike."""
_MAD_TO_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
_LEAST_SPREAD = 1e-3
"""Of the median: so that a loss that hardly moves is not all spikes."""


def trouble(loss: float, norm: float, window: Sequence[float], spike: float | None, size: int) -> str | None:
    """Why a step with this mean loss and gradient norm must change nothing, in words; None where it may.

    Args:
        window: losses of the last steps that counted.
        spike: robust z-score from which a loss is a spike; None for never.
        size: losses that a full window has.
    """
    if not math.isfinite(loss):
        return "the loss is not finite"
    if not math.isfinite(norm):
        return "the gradient is not finite"
    if spike is not None and len(window) >= _ENOUGH * size:
        score = robust_score(loss, window)
        if score > spike:
            return f"the loss lies {score:.1f} robust standard deviations above the median of the last {len(window)}"
    return None


def robust_score(value: float, window: Sequence[float]) -> float:
    """How many robust standard deviations (1.4826 MAD) `value` lies above the window's median.

    Iglewicz and Hoaglin 1993, section 3.3; unlike mean and variance, spikes in the window itself hardly move it.
    """
    middle = statistics.median(window)
    spread = _MAD_TO_SIGMA * statistics.median(abs(each - middle) for each in window)
    return (value - middle) / max(spread, _LEAST_SPREAD * abs(middle), 1e-12)
