"""Colour operations on batches, each sample with its own strength: torchvision's formulas, without a loop.

A batch of pictures is its three planes, red, green and blue, float32 (b, h, w) each, in [0, 1]. A strength that
changes nothing (factor 1, shift 0, false) gives back the same bits.

Every operation works on pixels one by one, in a fixed order and without transcendental functions, and the one sum
(`mean_grey`) is of integers. So the bits of a CPU's result depend neither on how wide its vectors are, nor on the
batch, and compiled for a CPU (`pixels.py`) they are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

Planes = tuple[Tensor, Tensor, Tensor]
_STEPS = 2.0**20
"""Grey values are rounded to whole multiples of 1 / _STEPS to be summed: a row of 2,047 pixels fits into int32."""


def planes_of(images: Tensor) -> Planes:
    """Planes in [0, 1] of uint8 (b, 3, h, w), or of float32 that is already so."""
    if images.dtype == torch.uint8:
        images = images.to(torch.float32) * (1.0 / 255.0)
    red, green, blue = images.unbind(dim=1)
    return red, green, blue


def grey_of(images: Planes) -> Tensor:
    """Luma of ITU-R 601 with torchvision's weights: float32 (b, h, w)."""
    red, green, blue = images
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def mean_grey(images: Planes) -> Tensor:
    """The mean of `grey_of` over a picture, the same whichever way it is added up: float32 (b, 1, 1)."""
    grey = (grey_of(images) * _STEPS).to(torch.int32)
    rows = grey.sum(dim=2, keepdim=True, dtype=torch.int32 if grey.shape[2] < 2048 else torch.int64)
    total = rows.sum(dim=1, keepdim=True, dtype=torch.int64)
    return total.to(torch.float32) * (1.0 / (_STEPS * grey.shape[1] * grey.shape[2]))


def adjust_brightness(images: Planes, factor: Tensor) -> Planes:
    """Scale each picture by its `factor`, float32 (b,), at least 0."""
    factor = factor[:, None, None]
    red, green, blue = images
    return (red * factor).clamp_max(1.0), (green * factor).clamp_max(1.0), (blue * factor).clamp_max(1.0)


def adjust_contrast(images: Planes, factor: Tensor) -> Planes:
    """Scale the distance to the picture's mean grey by `factor`, float32 (b,)."""
    return _blend(images, mean_grey(images), factor)


def adjust_saturation(images: Planes, factor: Tensor) -> Planes:
    """Scale the distance to each pixel's grey by `factor`, float32 (b,)."""
    return _blend(images, grey_of(images), factor)


def adjust_hue(images: Planes, shift: Tensor) -> Planes:
    """Turn the colour circle by `shift`, float32 (b,), in turns; value and saturation (HSV) stay."""
    red, green, blue = images
    top = torch.maximum(torch.maximum(red, green), blue)
    chroma = top - torch.minimum(torch.minimum(red, green), blue)
    inverse = 1.0 / torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        top == red,
        (green - blue) * inverse,
        torch.where(top == green, 2.0 + (blue - red) * inverse, 4.0 + (red - green) * inverse),
    )
    shift = shift[:, None, None]
    turned = sixths + 6.0 * shift
    place = turned - 6.0 * torch.floor(turned * (1.0 / 6.0))
    # Each channel is the value, less chroma times a trapezoid over the circle (Smith 1978, in closed form).
    return (
        torch.where(shift == 0, red, top - chroma * _unit(2.0 - (place - 3.0).abs())),
        torch.where(shift == 0, green, top - chroma * _unit((place - 2.0).abs() - 1.0)),
        torch.where(shift == 0, blue, top - chroma * _unit((place - 4.0).abs() - 1.0)),
    )


def jitter(images: Planes, strengths: Tensor) -> Planes:
    """All four in this order; `strengths` float32 (b, 4): three factors, and the shift of hue."""
    brightness, contrast, saturation, hue = strengths.unbind(dim=1)
    images = adjust_contrast(adjust_brightness(images, brightness), contrast)
    return adjust_hue(adjust_saturation(images, saturation), hue)


def to_grey(images: Planes, chosen: Tensor) -> Planes:
    """Grey in all channels where `chosen`, bool (b,)."""
    grey, chosen = grey_of(images), chosen[:, None, None]
    red, green, blue = images
    return torch.where(chosen, grey, red), torch.where(chosen, grey, green), torch.where(chosen, grey, blue)


def solarize(images: Tensor, chosen: Tensor) -> Tensor:
    """Invert values of 0.5 and above where `chosen`, bool (b,): float32 (b, …)."""
    least = torch.where(chosen, 0.5, 2.0)[(slice(None), *[None] * (images.dim() - 1))]
    return torch.where(images >= least, 1.0 - images, images)


def _blend(images: Planes, other: Tensor, factor: Tensor) -> Planes:
    factor = factor[:, None, None]
    rest = (1.0 - factor) * other
    red, green, blue = images
    return _unit(factor * red + rest), _unit(factor * green + rest), _unit(factor * blue + rest)


def _unit(x: Tensor) -> Tensor:
    return torch.relu(x).clamp_max(1.0)
