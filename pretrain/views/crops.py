"""Crops of a batch of pictures: made on the training device, each sample from its own key.

A crop, its resizing and its flip are two batched matrix products, `Wy @ X @ Wxᵀ`: each row of `Wy` and
`Wx` holds the antialiasing filter's weights for one output pixel, as in Pillow and in torchvision's
`antialias=True`. So every sample has its own box, there is no loop and no host synchronisation, and the
result does not depend on who else is in the batch. On a CPU the products cost more than they save once
canvases are large; there each picture is resized by itself (`cpu.py`), from the same box, to whole bytes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from data.keyed import uniform
from pretrain.views.cpu import crop_each, large

Interpolation = Literal["bilinear", "bicubic"]
_ATTEMPTS = 10
BOX_NUMBERS = 2 * (_ATTEMPTS + 1)
"""Uniform numbers that a random box takes: area and aspect of each candidate, and the place of the chosen one."""


def random_resized_crop_boxes(
    keys: Tensor,
    sizes: Tensor,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    stream: str = "crop",
) -> Tensor:
    """Boxes by the rule of torchvision's `RandomResizedCrop` (Szegedy et al. 2015, section 6).

    Ten candidates with area `scale` and log-uniform aspect `ratio` are drawn, the first that fits is
    taken; if none does, the largest central box with an allowed aspect.

    Args:
        keys: int64 (b,), the samples' random keys.
        sizes: int64 (b, 2), height and width of each picture.

    Returns:
        int64 (b, 4): top, left, height, width.
    """
    return boxes_of(uniform(keys, stream, (BOX_NUMBERS,)), sizes, scale, ratio)


def boxes_of(numbers: Tensor, sizes: Tensor, scale: tuple[float, float], ratio: tuple[float, float]) -> Tensor:
    """The same from uniform numbers (b, BOX_NUMBERS) in [0, 1) that are already drawn."""
    height, width = sizes.to(torch.float64).unbind(dim=1)
    drawn = rearrange(numbers.to(torch.float64), "b (n k) -> b n k", k=2)
    area = (height * width)[:, None] * (scale[0] + drawn[:, :_ATTEMPTS, 0] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + drawn[:, :_ATTEMPTS, 1] * (high - low))
    wide, tall = torch.round(torch.sqrt(area * aspect)), torch.round(torch.sqrt(area / aspect))
    fits = (wide > 0) & (tall > 0) & (wide <= width[:, None]) & (tall <= height[:, None])
    first = fits.to(torch.int64).argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    fallback_wide = torch.minimum(width, torch.round(height * ratio[1]).clamp(min=1))
    fallback_tall = torch.minimum(height, torch.round(width / ratio[0]).clamp(min=1))
    box_width = torch.where(found, wide.gather(1, first)[:, 0], fallback_wide)
    box_height = torch.where(found, tall.gather(1, first)[:, 0], fallback_tall)
    shift = torch.where(found[:, None], drawn[:, _ATTEMPTS], 0.5)
    top = torch.floor(shift[:, 0] * (height - box_height + found))
    left = torch.floor(shift[:, 1] * (width - box_width + found))
    return torch.stack([top, left, box_height, box_width], dim=1).to(torch.int64)


def center_boxes(sizes: Tensor, fraction: float = 1.0) -> Tensor:
    """The central square of each picture, `fraction` of its shorter side wide: int64 (b, 4)."""
    side = torch.clamp(torch.round(sizes.amin(dim=1) * fraction), min=1).to(torch.int64)
    start = (sizes - side[:, None]) // 2
    return torch.cat([start, side[:, None], side[:, None]], dim=1)


def flips(keys: Tensor, p: float = 0.5, stream: str = "flip") -> Tensor:
    """Which samples are mirrored: bool (b,)."""
    return uniform(keys, stream) < p


def crop_resize(
    images: Tensor,
    boxes: Tensor,
    size: int,
    flip: Tensor | None = None,
    interpolation: Interpolation = "bicubic",
) -> Tensor:
    """Cut each picture's box and resize it, antialiased, mirrored where asked.

    Args:
        images: uint8 (b, 3, height, width).
        boxes: int64 (b, 4): top, left, height, width, in pixels.
        size: side of the result in pixels.
        flip: bool (b,).

    Returns:
        float32 (b, 3, size, size) in [0, 1].
    """
    if large(images):
        view = crop_each(images, boxes, size, interpolation)
        return (view if flip is None else torch.where(flip[:, None, None, None], view.flip(3), view)) / 255.0
    channels, height, width = images.shape[1:]
    top, left, box_height, box_width = boxes.unbind(dim=1)
    down = _resampling(top, box_height, size, height, interpolation)
    across = _resampling(left, box_width, size, width, interpolation)
    if flip is not None:
        across = torch.where(flip[:, None, None], across.flip(1), across)
    pixels = rearrange(images.to(torch.float32, memory_format=torch.contiguous_format), "b c h w -> b (c h) w")
    # Mixed precision would round pixels and weights to 8 bits of mantissa: a view, and a target, is float32.
    with torch.autocast(images.device.type, enabled=False):
        pixels = rearrange(pixels @ across.mT, "b (c h) w -> b c h w", c=channels)
        return ((down[:, None] @ pixels) / 255.0).clamp(0.0, 1.0)


def _resampling(start: Tensor, length: Tensor, size: int, canvas: int, interpolation: Interpolation) -> Tensor:
    """Weights of `canvas` pixels for each of `size` output pixels along one side: float32 (b, size, canvas)."""
    steps = torch.arange(size, device=start.device) + 0.5
    places = torch.arange(canvas, device=start.device)
    scale = length[:, None] / size
    centre = start[:, None] + steps * scale
    distance = (places + 0.5 - centre[:, :, None]).abs() / torch.clamp(scale, min=1.0)[:, :, None]
    weight = _cubic(distance) if interpolation == "bicubic" else torch.clamp(1.0 - distance, min=0.0)
    inside = (places >= start[:, None]) & (places < (start + length)[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(dim=2, keepdim=True)


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Keys' cubic kernel of `|x|` (Keys 1981, equation 4; `a` as in Pillow)."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtract `mean` and divide by `std`, per channel: float32 (b, 3, s, s)."""
    shift = torch.tensor(mean, device=images.device)[:, None, None]
    return (images - shift) / torch.tensor(std, device=images.device)[:, None, None]
