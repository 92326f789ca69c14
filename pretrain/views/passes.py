"""What happens to a few pictures behind the crop, as functions that torch.compile makes one pass over memory each.

The same functions run as they are (eagerly) or compiled, with the same bits: see `color.py`. So whether they are
compiled may be decided anew at every start of a run: `fuse_views`. Compiling a view's functions takes some ten
seconds once, and a C++ compiler; an eager view takes several times as long as a compiled one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pretrain.views.blur import blur_by_taps
from pretrain.views.color import jitter, planes_of, solarize, to_grey

Pass = Callable[..., None]


def sharp(out: Tensor, images: Tensor, strengths: Tensor, flags: Tensor, mean: Tensor, scale: Tensor) -> None:
    """Jitter, grey, solarise and normalise into `out`, float32 (n, 3, s, s).

    Args:
        images: uint8, or float32 in [0, 1], (n, 3, s, s).
        strengths: float32 (n, 4); flags: bool (n, 2), grey and solarise.
        mean, scale: float32 (3,); scale is one over the standard deviation.
    """
    planes = to_grey(jitter(planes_of(images), strengths), flags[:, 0])
    done = [(solarize(plane, flags[:, 1]) - mean[n]) * scale[n] for n, plane in enumerate(planes)]
    out.copy_(torch.stack(done, dim=1))


def plain(out: Tensor, images: Tensor, strengths: Tensor, flags: Tensor, mean: Tensor, scale: Tensor) -> None:
    """The same for pictures without jitter: `strengths` is not used."""
    planes = to_grey(planes_of(images), flags[:, 0])
    done = [(solarize(plane, flags[:, 1]) - mean[n]) * scale[n] for n, plane in enumerate(planes)]
    out.copy_(torch.stack(done, dim=1))


def colors(out: Tensor, images: Tensor, strengths: Tensor, flags: Tensor) -> None:
    """What comes before a blur: jitter and grey."""
    out.copy_(torch.stack(to_grey(jitter(planes_of(images), strengths), flags[:, 0]), dim=1))


def soft(out: Tensor, padded: Tensor, weights: Tensor, flags: Tensor, mean: Tensor, scale: Tensor) -> None:
    """Blur, solarise and normalise into `out`; `padded` reaches the radius of `weights` beyond it on all sides."""
    view = solarize(blur_by_taps(padded, weights), flags[:, 1])
    out.copy_((view - mean[:, None, None]) * scale[:, None, None])


@dataclass
class _Fusion:
    on: bool = False


_FUSION = _Fusion()


def fuse_views(on: bool) -> None:
    """From now on this process compiles what makes views on a CPU, or does not; no bit depends on it."""
    _FUSION.on = on


def fused() -> bool:
    """Whether views on a CPU are made by compiled functions."""
    return _FUSION.on


def can_fuse() -> bool:
    """Whether there is a C++ compiler for torch.compile."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name)


@cache
def compiled(function: Pass) -> Pass:
    """A pass compiled for one thread: pictures are shared out over threads before."""
    options: Any = {"cpp.threads": 1}
    made: Pass = torch.compile(function, dynamic=False, options=options)
    return made
