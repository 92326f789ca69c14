"""Views on a CPU: torch's resize of bytes picture by picture, then passes over a few pictures at a time.

What stays in the cache from crop to normalisation is many times cheaper than a batch that goes through memory
once an operation. Threads share the pieces out; the bits of a view depend neither on their number nor on the
batch, nor on whether the passes are compiled.
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
from pretrain.views.passes import Pass, colors, compiled, fused, plain, sharp, soft

LARGE = 64
"""Canvases with a longer side are cropped picture by picture on a CPU; smaller ones by matrix products."""
PIECE = 2**16
"""Pixels that a pass goes over at a time, about: with its planes they stay in the cache."""

_MET: set[tuple[Pass, int, bool, int, bool]] = set()
"""Kinds of pieces that have been made compiled."""


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
    strengths = Strengths(jitter.flatten(0, 1), flags.flatten(0, 1), weights.flatten(0, 1))
    if images.dtype == torch.float32:
        cut = _Cut(images.flatten(0, 1), None, side, interpolation)
    else:
        cut = _Cut(images, boxes.flatten(0, 1).tolist(), side, interpolation)
    made = _Pieces(cut, strengths, torch.tensor(mean), 1.0 / torch.tensor(std), fused())
    return made.views().unflatten(0, jitter.shape[:2])


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


@dataclass
class _Cut:
    """The crops of `v` views, numbered through: that of sample n for view k is number k * b + n."""

    images: Tensor
    boxes: list[list[int]] | None
    """Without them `images` are the crops themselves."""
    side: int
    interpolation: str

    def some(self, numbers: list[int], mirrored: list[bool]) -> Tensor:
        """Bytes (or float32, where they are there) of these crops: (n, 3, side, side), plane by plane."""
        if self.boxes is None:
            return self.images[numbers]
        out = torch.empty(len(numbers), 3, self.side, self.side, dtype=torch.uint8)
        for place, (number, mirror) in enumerate(zip(numbers, mirrored, strict=True)):
            image = self.images[number % len(self.images)]
            pixels = _resized(image, self.boxes[number], self.side, self.interpolation)
            out[place] = pixels.flip(2) if mirror else pixels
        return out


@dataclass
class _Pieces:
    """All views of a call, made a few at a time; blurred ones apart from the others."""

    cut: _Cut
    strengths: Strengths
    """Over all views: (v * b, …)."""
    mean: Tensor
    scale: Tensor
    fused: bool

    def views(self) -> Tensor:
        """float32 (v * b, 3, side, side)."""
        jitter, weights = self.strengths.jitter, self.strengths.weights
        out = torch.empty(len(jitter), 3, self.cut.side, self.cut.side)
        blurred = (weights[:, 1:] > 0).any(dim=1)
        sharply: Pass = sharp if bool((jitter != torch.tensor([1.0, 1.0, 1.0, 0.0])).any()) else plain
        length = max(1, round(PIECE / self.cut.side**2))
        pieces = _pieces(sharply, ~blurred, length) + _pieces(soft, blurred, length)

        def make(start: int, stop: int) -> None:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                for kind, numbers in pieces[start:stop]:
                    self._make(kind, numbers, length, out)

        for number, (kind, numbers) in enumerate(pieces):
            what = (kind, length, 2 * len(numbers) >= length, self.cut.side, self.cut.boxes is None)
            if self.fused and what not in _MET:
                _MET.add(what)
                make(number, number + 1)  # compiled by one thread, before the others need it
        _shared_out(len(pieces), make)
        return out

    def _make(self, kind: Pass, numbers: list[int], length: int, out: Tensor) -> None:
        """Put a piece into `out`. Compiled for `length` pictures: a longish piece repeats its last one, others are
        made by the same functions as they are."""
        wanted, fuse = len(numbers), self.fused and 2 * len(numbers) >= length
        if fuse:
            numbers = numbers + numbers[-1:] * (length - wanted)
        direct = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        target = out[numbers[0] : numbers[-1] + 1] if direct else out.new_empty(len(numbers), *out.shape[1:])
        self._pass(compiled if fuse else _as_it_is, kind, numbers, target)
        if not direct:
            out[numbers[:wanted]] = target[:wanted]

    def _pass(self, run: Callable[[Pass], Pass], kind: Pass, numbers: list[int], out: Tensor) -> None:
        jitter, flags = self.strengths.jitter[numbers], self.strengths.flags[numbers]
        images, flags = self.cut.some(numbers, flags[:, 0].tolist()), flags[:, 1:]
        if kind is not soft:
            run(kind)(out, images, jitter, flags, self.mean, self.scale)
            return
        weights = self.strengths.weights[numbers]
        if run is _as_it_is:
            weights = weights[:, : int((weights > 0).sum(dim=1).max())]
        colored = torch.empty_like(out)
        run(colors)(colored, images, jitter, flags)
        padded = _reflected(colored, weights.shape[1] - 1, self.cut.side)
        run(soft)(out, padded, weights, flags, self.mean, self.scale)


def _as_it_is(function: Pass) -> Pass:
    return function


def _pieces(kind: Pass, chosen: Tensor, length: int) -> list[tuple[Pass, list[int]]]:
    """Numbers of the chosen views, `length` at a time."""
    numbers = chosen.nonzero()[:, 0].tolist()
    return [(kind, numbers[start : start + length]) for start in range(0, len(numbers), length)]


def _reflected(images: Tensor, radius: int, side: int) -> Tensor:
    """Continued on all sides, as often as it takes."""
    if radius < side:
        return F.pad(images, [radius] * 4, mode="reflect")
    places = torch.arange(-radius, side + radius)
    if side > 1:
        places = places.remainder(2 * (side - 1))
        places = torch.minimum(places, 2 * (side - 1) - places)
    else:
        places = torch.zeros_like(places)
    return images[:, :, places][:, :, :, places]


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
