"""Mixup and CutMix between neighbours, for supervised pre-training."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from data.errors import UserError
from data.keyed import uniform

Probability = Annotated[float, Field(ge=0, le=1)]
_TRIES = 32
"""Pairs drawn for one number of a Beta distribution."""


class MixConfig(BaseModel):
    """How pictures of one batch are mixed; one of the two is chosen where both are on (timm's recipe)."""

    model_config = ConfigDict(extra="forbid")

    mixup: float = Field(default=0.8, ge=0, le=1)
    """Both parameters of mixup's Beta distribution (Zhang et al. 2018); 0 for no mixup."""
    cutmix: float = Field(default=1.0, ge=0, le=1)
    """The same for CutMix (Yun et al. 2019); 0 for no CutMix."""
    probability: Probability = 1.0
    """Share of pairs that are mixed."""
    switch: Probability = 0.5
    """Share of mixed pairs that get CutMix where both are on."""


def mix(images: Tensor, keys: Tensor, config: MixConfig, stream: str = "mix") -> tuple[Tensor, Tensor, Tensor]:
    """Mix samples 0 and 1, 2 and 3, … of a batch with each other.

    Partners are neighbours, so that a batch cut into even pieces is mixed as the whole one is.

    Args:
        images: float (b, c, h, w), b even; keys: int64 (b,).

    Returns:
        The mixed pictures; each sample's partner, int64 (b,); and the share of its own label that each
        sample keeps, float32 (b,): the loss is `share * loss(own) + (1 - share) * loss(partner's)`.

    Raises:
        UserError: an odd number of samples.
    """
    if len(images) % 2:
        raise UserError(
            f"mixup and cutmix pair neighbours, but a batch holds {len(images)} samples; use an even number"
        )
    partner = torch.arange(len(images), device=keys.device) ^ 1
    # Both of a pair use the numbers of the even one: their shares are equal, as in timm's pair mode.
    pair = torch.arange(len(images), device=keys.device) & ~1
    drawn = uniform(keys, stream, (4,))[pair]
    cut = torch.zeros_like(drawn[:, 0], dtype=torch.bool)
    if config.cutmix:
        cut = drawn[:, 1] < (config.switch if config.mixup else 1.0)
    share = torch.where(cut, beta(keys, config.cutmix, f"{stream}.cut")[pair], beta(keys, config.mixup, stream)[pair])
    share = torch.where(drawn[:, 0] < config.probability, share, 1.0).to(torch.float32)
    boxes = _boxes(1.0 - share, drawn[:, 2:], images.shape[-2:])
    share = torch.where(cut, 1.0 - boxes.to(torch.float32).mean(dim=(1, 2)), share)
    others = images[partner]
    weight = share[:, None, None, None].to(images.dtype)
    pasted = torch.where(boxes[:, None], others, images)
    return torch.where(cut[:, None, None, None], pasted, weight * images + (1 - weight) * others), partner, share


def beta(keys: Tensor, parameter: float, stream: str) -> Tensor:
    """A number of Beta(parameter, parameter) for each key: float64 (b,); ones where `parameter` is 0.

    By Jöhnk's method (1964): of uniform pairs (u, v), x = u^(1/a) and y = v^(1/a), the first with x + y <= 1
    gives x / (x + y). For parameters up to 1 each pair is taken with probability 1/2 or more, so that of
    32 pairs none is but once in 4 billion draws.
    """
    if not parameter:
        return torch.ones(len(keys), dtype=torch.float64, device=keys.device)
    logs = torch.log(uniform(keys, f"{stream}.beta", (_TRIES, 2)).to(torch.float64) + 2.0**-25) / parameter
    x, y = logs.unbind(dim=2)
    first = (torch.exp(x) + torch.exp(y) <= 1.0).to(torch.int64).argmax(dim=1, keepdim=True)
    return torch.sigmoid(x - y).gather(1, first)[:, 0]


def _boxes(area: Tensor, place: Tensor, size: torch.Size) -> Tensor:
    """Boxes of a share `area` (b,) of the picture around a uniform centre, cut at the border: bool (b, h, w)."""
    inside = []
    for axis, length in enumerate(size):
        half = torch.floor(length * torch.sqrt(area)) / 2.0
        centre = torch.floor(place[:, axis] * length)
        spots = torch.arange(length, device=area.device)
        inside.append((spots >= torch.floor(centre - half)[:, None]) & (spots < torch.floor(centre + half)[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]


def mixed_targets(labels: Tensor, partner: Tensor, share: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Soft labels of mixed pictures, smoothed: float32 (b, classes), rows that add up to 1."""
    own = torch.nn.functional.one_hot(labels, classes).to(torch.float32)
    mixed = share[:, None] * own + (1.0 - share[:, None]) * own[partner]
    return (1.0 - smoothing) * mixed + smoothing / classes
