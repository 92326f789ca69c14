"""Schedules as pure functions of progress, the share of training done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Shape = Literal["sqrt", "linear"]


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`, in the unit of both.

    For weight decay and the teacher's momentum (DINO, section 3.2; BYOL, section 3.2), and whatever else
    moves slowly at both ends.
    """
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def linear(progress: float, start: float, end: float, share: float = 1.0) -> float:
    """A straight line from `start` to `end` over the first `share` of training, then `end`.

    DINO's teacher temperature rises so (appendix B).
    """
    return start + (end - start) * min(progress / share, 1.0) if share > 0.0 else end


def warmup_cosine(progress: float, peak: float, warmup: float, final: float = 0.0) -> float:
    """Linear from 0 to `peak` over the first `warmup` share, then half a cosine down to `final`.

    Loshchilov and Hutter 2017, equation 5, without restarts; `peak` and `final` are in the unit of the result.
    """
    if progress < warmup:
        return peak * progress / warmup
    return cosine(_after(progress, warmup), peak, final)


def warmup_linear(progress: float, peak: float, warmup: float, final: float = 0.0) -> float:
    """Linear from 0 to `peak` over the first `warmup` share, then linear down to `final` (BERT, appendix A.2)."""
    if progress < warmup:
        return peak * progress / warmup
    return linear(_after(progress, warmup), peak, final)


def warmup_constant(progress: float, peak: float, warmup: float) -> float:
    """Linear from 0 to `peak` over the first `warmup` share, then `peak`."""
    return peak * progress / warmup if progress < warmup else peak


def warmup_stable_decay(
    progress: float, peak: float, warmup: float, decay: float, final: float = 0.0, shape: Shape = "sqrt"
) -> float:
    """Up over the first `warmup` share, level, and down to `final` over the last `decay` share.

    Hu et al. 2024 (MiniCPM, section 4). Hägele et al. 2024, section 3, find the fall as one minus a square
    root (`sqrt`) better than a `linear` one.
    """
    if progress < warmup:
        return peak * progress / warmup
    if decay <= 0.0 or progress <= 1.0 - decay:
        return peak
    fallen = min((progress - (1.0 - decay)) / decay, 1.0)
    return final + (peak - final) * (1.0 - (math.sqrt(fallen) if shape == "sqrt" else fallen))


def warmup_steps(progress: float, peak: float, warmup: float, milestones: Sequence[float], factor: float) -> float:
    """Up over the first `warmup` share, then times `factor` at each milestone (He et al. 2016, section 3.4)."""
    passed = sum(progress >= milestone for milestone in milestones)
    return warmup_constant(progress, peak, warmup) * factor**passed


def _after(progress: float, warmup: float) -> float:
    """The share of what lies behind the warm-up that is done."""
    return min((progress - warmup) / (1.0 - warmup), 1.0) if warmup < 1.0 else 1.0
