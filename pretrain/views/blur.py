"""Gaussian blur of a batch, each sample with its own width."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

REACH = 4.0
"""Standard deviations that the kernel covers to each side; beyond lie 6e-5 of its weight."""


def gaussian_weights(sigma: Tensor, radius: int) -> Tensor:
    """Weights at distances 0 … radius, those of both sides adding up to 1: float32 (b, radius + 1).

    A `sigma` of 0 gives exactly (1, 0, 0, …): a blur that changes nothing.
    """
    distance = torch.arange(radius + 1, device=sigma.device)
    # In double precision: libraries' exponentials differ in the last bit with the length of the vector.
    wide = torch.where(sigma > 0, sigma, 1.0).to(torch.float64)[:, None]
    weight = torch.exp(-0.5 * (distance / wide).square()) * ((distance == 0) | (sigma[:, None] > 0))
    return (weight / (2.0 * weight.sum(dim=1, keepdim=True) - weight[:, :1])).to(torch.float32)


def blur_radius(largest: float) -> int:
    """Pixels that a blur of at most `largest` standard deviation reaches to each side."""
    return max(1, math.ceil(REACH * largest))


def taps(sigma: Tensor, largest: float) -> Tensor:
    """Weights for a blur that adds up neighbours, those below a millionth left out: float32 (b, radius + 1)."""
    weights = gaussian_weights(sigma, blur_radius(largest))
    return torch.where(weights < 1e-6, 0.0, weights)


def gaussian_blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Blur each picture with its own standard deviation, reflecting at the borders; two matrix products.

    Args:
        images: float32 (b, c, h, w).
        sigma: float32 (b,), in pixels, at most `largest`; 0 leaves a picture as it is.
    """
    height, width = images.shape[-2:]
    weights = gaussian_weights(sigma, blur_radius(largest))
    down, across = _blurring(weights, height), _blurring(weights, width)
    channels = images.shape[1]
    with torch.autocast(images.device.type, enabled=False):
        blurred = rearrange(images, "b c h w -> b (c h) w") @ across.mT
        blurred = down @ rearrange(blurred, "b (c h) w -> b h (c w)", c=channels)
    return rearrange(blurred, "b h (c w) -> b c h w", c=channels)


def _blurring(weights: Tensor, length: int) -> Tensor:
    """The blur along a side as a matrix, reflected at its ends: float32 (b, length, length)."""
    radius = weights.shape[1] - 1
    offsets = torch.arange(-radius, radius + 1, device=weights.device)
    places = torch.arange(length, device=weights.device)[:, None] + offsets
    if length > 1:
        period = 2 * (length - 1)
        places = places.remainder(period)
        places = torch.minimum(places, period - places)
    else:
        places = torch.zeros_like(places)
    matrix = weights.new_zeros(len(weights), length, length)
    values = weights[:, offsets.abs()][:, None].expand(-1, length, -1)
    return matrix.scatter_add(2, places.expand(len(weights), -1, -1), values)
