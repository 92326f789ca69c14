"""Views on a CPU, picture by picture: torch's resize of bytes, then one pass of compiled code.

A picture that stays in the cache from crop to normalisation is many times cheaper than a batch that goes
through memory once an operation. Threads share the samples out, and each sample is made alone: its bits
depend neither on their number nor on the batch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.views.native import library

LARGE = 64
"""Canvases with a longer side are cropped picture by picture on a CPU; smaller ones by matrix products."""


def large(images: Tensor) -> bool:
    """Whether these canvases (b, 3, h, w) are cropped picture by picture."""
    return images.device.type == "cpu" and max(images.shape[-2:]) > LARGE


def plain(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Strengths, flags and weights (see `view_each`) that change nothing."""
    strengths = torch.tensor([1.0, 1.0, 1.0, 0.0]).repeat(count, 1)
    return strengths, torch.zeros(count, 3, dtype=torch.bool), torch.ones(count, 1)


@torch.library.custom_op("headwater::crop_each", mutates_args=())
def crop_each(images: Tensor, boxes: Tensor, side: int, interpolation: str) -> Tensor:
    """Cut each box and resize it, antialiased, rounding to bytes as Pillow does.

    Args:
        images: uint8 (b, 3, h, w) on the CPU, of any strides; interleaved pixels are quickest.
        boxes: int64 (b, 4): top, left, height, width.

    Returns:
        uint8 (b, 3, side, side), channels last in memory.
    """
    out = torch.empty(len(images), side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    corners = boxes.tolist()

    def some(start: int, stop: int) -> None:
        for n in range(start, stop):
            out[n] = _resized(images[n], corners[n], side, interpolation)

    _shared_out(len(images), some)
    return out


@crop_each.register_fake
def _(images: Tensor, boxes: Tensor, side: int, interpolation: str) -> Tensor:
    return images.new_empty(len(images), side, side, 3).permute(0, 3, 1, 2)


@torch.library.custom_op("headwater::view_each", mutates_args=())
def view_each(
    images: Tensor,
    boxes: Tensor,
    strengths: Tensor,
    flags: Tensor,
    weights: Tensor,
    side: int,
    interpolation: str,
    mean: list[float],
    std: list[float],
) -> Tensor:
    """Whole views: cut, resize, mirror, jitter, grey, blur, solarise, normalise; needs `library()`.

    Args:
        images: uint8 (b, 3, h, w) on the CPU; or float32 (b, 3, side, side), already cropped and mirrored.
        boxes: int64 (b, 4): top, left, height, width; not used for cropped pictures.
        strengths: float32 (b, 4): factors of brightness, contrast and saturation, shift of hue.
        flags: bool (b, 3): flip, grey, solarise.
        weights: float32 (b, radius + 1): of the blur, at distances from 0; those below 1e-6 are left out.

    Returns:
        float32 (b, 3, side, side).
    """
    native = library()
    assert native is not None
    cropped = images.dtype == torch.float32
    out = images.contiguous().clone() if cropped else torch.empty(len(images), 3, side, side)
    strengths, weights = strengths.contiguous(), weights.contiguous()
    marks = flags.to(torch.uint8).contiguous()
    reach = weights.shape[1] - 1
    constants = torch.tensor([mean, std])
    corners = [] if cropped else boxes.tolist()

    def draw(first: int, count: int, pixels: Tensor | None, scratch: Tensor, rows: Tensor) -> None:
        native.headwater_render(
            ctypes.c_void_p(None if pixels is None else pixels.data_ptr()),
            *(ctypes.c_void_p(t[first:].data_ptr()) for t in (out,)),
            *(ctypes.c_int64(n) for n in (count, side)),
            *(ctypes.c_void_p(t[first:].data_ptr()) for t in (strengths, marks, weights)),
            ctypes.c_int64(reach),
            *(ctypes.c_void_p(t.data_ptr()) for t in (constants[0], constants[1], scratch, rows)),
        )

    def some(start: int, stop: int) -> None:
        scratch = torch.empty(side * side + side + 2 * reach)
        rows = torch.empty(2 * reach + 1, dtype=torch.int64)
        if cropped:
            return draw(start, stop - start, None, scratch, rows)
        for n in range(start, stop):
            draw(n, 1, _resized(images[n], corners[n], side, interpolation), scratch, rows)

    _shared_out(len(images), some)
    return out


@view_each.register_fake
def _(
    images: Tensor,
    boxes: Tensor,
    strengths: Tensor,
    flags: Tensor,
    weights: Tensor,
    side: int,
    interpolation: str,
    mean: list[float],
    std: list[float],
) -> Tensor:
    return images.new_empty(len(images), 3, side, side, dtype=torch.float32)


def _resized(image: Tensor, box: list[int], side: int, interpolation: str) -> Tensor:
    """One picture's box as uint8 (3, side, side), channels last in memory."""
    top, left, height, width = box
    native = library()
    if native is None:
        cut = image[:, top : top + height, left : left + width][None].contiguous(memory_format=torch.channels_last)
    else:
        pixels = torch.empty(1, height, width, 3, dtype=torch.uint8)
        native.headwater_cut(
            ctypes.c_void_p(image.data_ptr()),
            *(ctypes.c_int64(stride) for stride in image.stride()),
            (ctypes.c_int64 * 4)(*box),
            ctypes.c_void_p(pixels.data_ptr()),
        )
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
