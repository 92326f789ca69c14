"""Colour operations on batches, each sample with its own strength: torchvision's formulas, without a loop.

Pictures are float32 (b, 3, h, w) in [0, 1]. A strength that changes nothing (factor 1, shift 0, false) gives
back the same bits, so an operation runs on the whole batch and skipped samples need no gather.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grey_of(images: Tensor) -> Tensor:
    """Luma of ITU-R 601 with torchvision's weights: float32 (b, 1, h, w)."""
    red, green, blue = images.unbind(dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale each picture by its `factor`, float32 (b,)."""
    return (images * factor[:, None, None, None]).clamp(0.0, 1.0)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance to the picture's mean grey by `factor`, float32 (b,)."""
    return _blend(images, grey_of(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance to each pixel's grey by `factor`, float32 (b,)."""
    return _blend(images, grey_of(images), factor)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by `shift`, float32 (b,), in turns; value and saturation (HSV) stay."""
    red, green, blue = images.unbind(dim=1)
    top, bottom = images.amax(dim=1), images.amin(dim=1)
    chroma = top - bottom
    inverse = 1.0 / torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        top == red,
        (green - blue) * inverse,
        torch.where(top == green, 2.0 + (blue - red) * inverse, 4.0 + (red - green) * inverse),
    )
    turned = sixths + 6.0 * shift[:, None, None]
    place = (turned - 6.0 * torch.floor(turned * (1.0 / 6.0)))[:, None]
    # Each channel is the value, less chroma times a trapezoid over the circle (Smith 1978, in closed form).
    phase = place + torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    phase = torch.where(phase >= 6.0, phase - 6.0, phase)
    fall = torch.minimum(phase, 4.0 - phase).clamp(0.0, 1.0)
    return torch.where(shift[:, None, None, None] == 0, images, top[:, None] - chroma[:, None] * fall)


def to_grey(images: Tensor, chosen: Tensor) -> Tensor:
    """Grey in all channels where `chosen`, bool (b,)."""
    return torch.where(chosen[:, None, None, None], grey_of(images), images)


def solarize(images: Tensor, chosen: Tensor) -> Tensor:
    """Invert values of 0.5 and above where `chosen`, bool (b,)."""
    return torch.where(chosen[:, None, None, None] & (images >= 0.5), 1.0 - images, images)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = factor[:, None, None, None]
    return (factor * images + (1.0 - factor) * other).clamp(0.0, 1.0)
