"""Schedules as pure functions of progress, the share of training done."""

from __future__ import annotations

import math


def warmup_cosine(progress: float, peak: float, warmup: float, final: float = 0.0) -> float:
    """Linear from 0 to `peak` over the first `warmup` share, then half a cosine down to `final`.

    Loshchilov and Hutter 2017, equation 5, without restarts; `peak` and `final` are in the unit of the result.
    """
    if progress < warmup:
        return peak * progress / warmup
    share = (progress - warmup) / (1.0 - warmup) if warmup < 1.0 else 1.0
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))
