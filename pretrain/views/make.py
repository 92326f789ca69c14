"""Views of a batch: every parameter drawn from the samples' keys, every operation on the whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import ImageBatch
from data.keyed import uniform
from pretrain.views.blur import gaussian_blur
from pretrain.views.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    solarize,
    to_grey,
)
from pretrain.views.config import Presentation, ViewConfig, ViewsConfig
from pretrain.views.crops import crop_resize, normalize, random_resized_crop_boxes

_DRAWN = 10
"""Numbers drawn for a view besides its box: see `draw`."""


@dataclass
class Drawn:
    """The parameters of one view of each of `b` samples."""

    boxes: Tensor
    """int64 (b, 4): top, left, height, width."""
    flip: Tensor
    """bool (b,)."""
    jitter: Tensor
    """float32 (b, 4): factors of brightness, contrast and saturation, shift of hue; (1, 1, 1, 0) for none."""
    grey: Tensor
    """bool (b,)."""
    sigma: Tensor
    """float32 (b,): of the blur, in pixels; 0 for none."""
    solarize: Tensor
    """bool (b,)."""


def make_views(
    batch: ImageBatch, config: ViewsConfig, presentation: Presentation, stream: str = "views"
) -> list[Tensor]:
    """Augmented views of a batch, normalised for the encoder.

    One float32 tensor (views, b, 3, s, s) for each size, in the order in which the sizes first appear in
    `config`: two-view methods get a list of one, multi-crop gets [global views, local views]. A view depends
    on its sample's pixels and key, on `stream` and on its number alone, not on the batch around it.

    Args:
        presentation: the encoder's `VisionConfig`: image size, mean, std and interpolation.
        stream: name of the random stream; another one gives other views of the same samples.
    """
    sizes: dict[int, list[Tensor]] = {}
    number = 0
    for kind in config.views:
        side = kind.size or presentation.image_size
        for _ in range(kind.count):
            drawn = draw(batch.keys, batch.sizes, kind, f"{stream}.{number}")
            view = render(batch.images, drawn, kind, side, presentation)
            sizes.setdefault(side, []).append(view)
            number += 1
    return [torch.stack(views) for views in sizes.values()]


def draw(keys: Tensor, sizes: Tensor, kind: ViewConfig, stream: str) -> Drawn:
    """Parameters of one view, from the samples' keys (b,) and their pictures' sizes (b, 2)."""
    numbers = uniform(keys, f"{stream}.color", (_DRAWN,))
    jitter = torch.tensor([1.0, 1.0, 1.0, 0.0], device=keys.device).expand(len(keys), 4)
    if kind.jitter is not None:
        ranges = (kind.jitter.brightness, kind.jitter.contrast, kind.jitter.saturation)
        bounds = [(max(0.0, 1.0 - r), 1.0 + r) for r in ranges] + [(-kind.jitter.hue, kind.jitter.hue)]
        low, high = torch.tensor(bounds, device=keys.device).unbind(dim=1)
        strengths = low + numbers[:, 1:5] * (high - low)
        jitter = torch.where(numbers[:, :1] < kind.jitter.probability, strengths, jitter)
    sigma = torch.zeros(len(keys), device=keys.device)
    if kind.blur is not None:
        least, most = kind.blur.sigma
        sigma = torch.where(numbers[:, 6] < kind.blur.probability, least + numbers[:, 7] * (most - least), sigma)
    return Drawn(
        boxes=random_resized_crop_boxes(keys, sizes, kind.scale, kind.ratio, f"{stream}.crop"),
        flip=numbers[:, 9] < kind.flip,
        jitter=jitter,
        grey=numbers[:, 5] < kind.grey,
        sigma=sigma,
        solarize=numbers[:, 8] < kind.solarize,
    )


def render(images: Tensor, drawn: Drawn, kind: ViewConfig, side: int, presentation: Presentation) -> Tensor:
    """One view of each picture: crop and flip, jitter (brightness, contrast, saturation, hue), grey, blur,
    solarise, normalise; float32 (b, 3, side, side) from uint8 (b, 3, height, width)."""
    view = crop_resize(images, drawn.boxes, side, drawn.flip, presentation.interpolation)
    if kind.jitter is not None:
        brightness, contrast, saturation, hue = drawn.jitter.unbind(dim=1)
        view = adjust_saturation(adjust_contrast(adjust_brightness(view, brightness), contrast), saturation)
        view = adjust_hue(view, hue)
    if kind.grey:
        view = to_grey(view, drawn.grey)
    if kind.blur is not None:
        view = gaussian_blur(view, drawn.sigma, kind.blur.sigma[1])
    if kind.solarize:
        view = solarize(view, drawn.solarize)
    return normalize(view, presentation.mean, presentation.std)
