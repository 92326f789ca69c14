"""Views on a CPU, picture by picture: torch's resize of bytes, then one pass of compiled code.

A picture that stays in the cache from crop to normalisation is many times cheaper than a batch that goes
through memory once an operation. Threads share the samples out, and each sample is made alone: its bits
depend neither on their number nor on the batch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.kernels import kernels
from pretrain.views.native import library

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
    """float32 (v, b, radius + 1): of the blur, at distances from 0; those below 1e-6 are left out."""

    @classmethod
    def only_flip(cls, flip: Tensor) -> Strengths:
        """Views that are mirrored where `flip`, bool (v, b), and nothing else."""
        none = torch.zeros_like(flip)
        jitter = torch.tensor([1.0, 1.0, 1.0, 0.0]).expand(*flip.shape, 4)
        return cls(jitter, torch.stack([flip, none, none], dim=-1), torch.ones(*flip.shape, 1))


def views_each(
    images: Tensor,
    boxes: Tensor,
    strengths: Strengths,
    side: int,
    interpolation: str,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Whole views: cut, resize, mirror, jitter, grey, blur, solarise, normalise; needs `native.library()`.

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
    native = library()
    assert native is not None
    render = native.headwater_render
    views, count = jitter.shape[:2]
    cropped = images.dtype == torch.float32
    out = images.contiguous().clone() if cropped else torch.empty(views, count, 3, side, side)
    jitter, weights, marks = jitter.contiguous(), weights.contiguous(), flags.to(torch.uint8).contiguous()
    constants, reach = torch.tensor([mean, std]), weights.shape[-1] - 1
    corners = [] if cropped else boxes.tolist()
    # Addresses of the first view's first sample, and how far it is from there to the next sample.
    own = [(t.data_ptr(), t[0, 0].nbytes) for t in (out, jitter, marks, weights)]

    def some(start: int, stop: int) -> None:
        scratch = torch.empty(side * side + side + 2 * reach)
        rows = torch.empty(2 * reach + 1, dtype=torch.int64)
        rest = [t.data_ptr() for t in (constants[0], constants[1], scratch, rows)]
        for n in range(start, stop):
            for view in range(views):
                pixels = None if cropped else _resized(images[n], corners[view][n], side, interpolation)
                place = view * count + n
                target, *values = [first + size * place for first, size in own]
                render(None if pixels is None else pixels.data_ptr(), target, 1, side, *values, reach, *rest)

    _shared_out(count, some)
    return out


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
    """Cut each box and resize it, antialiased, rounding to bytes as Pillow does; for where nothing is compiled.

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
    native = library()
    if native is None:
        cut = image[:, top : top + height, left : left + width][None].contiguous(memory_format=torch.channels_last)
    else:
        pixels = torch.empty(1, height, width, 3, dtype=torch.uint8)
        native.headwater_cut(image.data_ptr(), *image.stride(), (ctypes.c_int64 * 4)(*box), pixels.data_ptr())
        cut = pixels.permute(0, 3, 1, 2)
    if (height, width) == (side, side):
        return cut[0]
    return F.interpolate(cut, (side, side), mode=interpolation, antialias=True)[0]


def _shared_out(count: int, some: Callable[[int, int], None]) -> None:
    """Run `some(start, stop)` over all samples, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), count)
    if threads <= 1:
        return some(0, count)
    bounds = [count * part // threads for part in range(threads + 1)]
    list(_threads(os.getpid(), threads).map(some, bounds[:-1], bounds[1:]))
    return None


@cache
def _threads(process: int, count: int) -> ThreadPoolExecutor:
    """Threads do not survive a fork, so each process has its own."""
    return ThreadPoolExecutor(count, thread_name_prefix="views")
