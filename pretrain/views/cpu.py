"""Views on a CPU: torch's resize of bytes picture by picture, and compiled passes over one view at a time.

What stays in the cache from crop to normalisation is many times cheaper than a batch that goes through memory
once an operation. Threads share the views out; the bits of a view depend neither on their number nor on the batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from threading import Barrier

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.kernels import kernels

LARGE = 64
"""Canvases with a longer side are cropped picture by picture on a CPU; smaller ones by matrix products."""


def large(images: Tensor) -> bool:
    """Whether these canvases (b, 3, h, w) are cropped picture by picture."""
    return kernels(images.device) == "cpu" and max(images.shape[-2:]) > LARGE


@dataclass
class Strengths:
    """What happens to each of `v` views of `b` pictures behind the crop; tensors on the CPU."""

    jitter: Tensor
    """float32 (v, b, 4): factors of brightness, contrast and saturation, shift of hue; (1, 1, 1, 0) for none."""
    flags: Tensor
    """bool (v, b, 3): flip, grey, solarise."""
    weights: Tensor
    """float32 (v, b, radius + 1): of the blur, at distances from 0 (`blur.taps`)."""


def views_each(
    images: Tensor,
    boxes: Tensor,
    strengths: Strengths,
    side: int,
    interpolation: str,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Whole views: cut, resize, mirror, jitter, grey, blur, solarise, normalise.

    Args:
        images: uint8 (b, 3, h, w) on the CPU, of any strides (interleaved pixels are quickest); or float32
            (v, b, 3, side, side), already cropped and mirrored.
        boxes: int64 (v, b, 4): top, left, height, width; not used for cropped pictures.

    Returns:
        float32 (v, b, 3, side, side).
    """
    parts = (strengths.jitter, strengths.flags, strengths.weights)
    return _views_each(images, boxes, *parts, side, interpolation, list(mean), list(std))


@torch.library.custom_op("headwater::views_each", mutates_args=())
def _views_each(
    images: Tensor,
    boxes: Tensor,
    jitter: Tensor,
    flags: Tensor,
    weights: Tensor,
    side: int,
    interpolation: str,
    mean: list[float],
    std: list[float],
) -> Tensor:
    from pretrain.views.pixels import room, view_of_bytes, views_of_crops  # numba takes a while to import

    jitters, flag, taps = (part.flatten(0, 1).contiguous().numpy() for part in (jitter, flags, weights))
    average, scale = torch.tensor(mean).numpy(), (1.0 / torch.tensor(std)).numpy()
    made = torch.empty(*jitter.shape[:2], 3, side, side)
    views = made.flatten(3).flatten(0, 1).numpy()
    crops = images.contiguous().flatten(3).flatten(0, 1).numpy() if images.dtype == torch.float32 else None
    corners = [] if crops is not None else boxes.flatten(0, 1).tolist()
    space, count = room(side, weights.shape[2] - 1), len(images)

    def make(start: int, stop: int) -> None:
        scratch = torch.empty(4, space).numpy()
        if crops is not None:
            some = slice(start, stop)
            given = (crops[some], jitters[some], flag[some], taps[some])
            views_of_crops(*given, average, scale, views[some], scratch, side)
            return
        for n in range(start, stop):
            pixels = _resized(images[n % count], corners[n], side, interpolation).permute(1, 2, 0).contiguous()
            view_of_bytes(pixels.numpy(), n, jitters, flag, taps, average, scale, views, scratch)

    _shared_out(len(views), make)
    return made


@_views_each.register_fake
def _(
    images: Tensor,
    boxes: Tensor,
    jitter: Tensor,
    flags: Tensor,
    weights: Tensor,
    side: int,
    interpolation: str,
    mean: list[float],
    std: list[float],
) -> Tensor:
    return images.new_empty(*jitter.shape[:2], 3, side, side, dtype=torch.float32)


@torch.library.custom_op("headwater::crop_each", mutates_args=())
def crop_each(images: Tensor, boxes: Tensor, side: int, interpolation: str) -> Tensor:
    """Cut each box and resize it, antialiased, rounding to bytes as Pillow does.

    Args:
        images: uint8 (b, 3, h, w) on the CPU.
        boxes: int64 (b, 4): top, left, height, width.

    Returns:
        uint8 (b, 3, side, side).
    """
    out = torch.empty(len(images), 3, side, side, dtype=torch.uint8)
    corners = boxes.tolist()

    def some(start: int, stop: int) -> None:
        for n in range(start, stop):
            out[n] = _resized(images[n], corners[n], side, interpolation)

    _shared_out(len(images), some)
    return out


@crop_each.register_fake
def _(images: Tensor, boxes: Tensor, side: int, interpolation: str) -> Tensor:
    return images.new_empty(len(images), 3, side, side)


def _resized(image: Tensor, box: list[int], side: int, interpolation: str) -> Tensor:
    """One picture's box as uint8 (3, side, side), channels last in memory."""
    top, left, height, width = box
    cut = image[:, top : top + height, left : left + width][None].contiguous(memory_format=torch.channels_last)
    if (height, width) == (side, side):
        return cut[0]
    return F.interpolate(cut, (side, side), mode=interpolation, antialias=True)[0]


def _shared_out(count: int, some: Callable[[int, int], None]) -> None:
    """Run `some(start, stop)` over all of `count`, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        return some(0, count)
    bounds = [count * part // threads for part in range(threads + 1)]
    list(_threads(os.getpid(), threads).map(some, bounds[:-1], bounds[1:]))
    return None


@cache
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    """Threads that take all of torch's work on themselves; they do not survive a fork, so each process has its own."""
    started, before = Barrier(count), torch.get_num_threads()

    def alone() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # the first question would set it anew
        started.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="views", initializer=alone)
    list(pool.map(int, range(count)))
    torch.set_num_threads(before)  # the threads' calls reach what a process has once
    return pool
