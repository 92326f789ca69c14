"""Views of a batch: every parameter drawn from the samples' keys, every operation on the whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.batch import ImageBatch
from data.keyed import uniform
from pretrain.kernels import kernels
from pretrain.views.blur import gaussian_blur, taps
from pretrain.views.color import jitter, planes_of, solarize, to_grey
from pretrain.views.config import Presentation, ViewConfig, ViewsConfig
from pretrain.views.cpu import Strengths, large, views_each
from pretrain.views.crops import BOX_NUMBERS, boxes_of, crop_resize, normalize

_NUMBERS = BOX_NUMBERS + 10
"""Uniform numbers drawn for a view, in one go for all views: see `draw`."""


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

    def parts(self, count: int) -> list[Drawn]:
        """`count` parts of the same length, one behind the other."""
        return [Drawn(*each) for each in zip(*(values.chunk(count) for values in vars(self).values()), strict=True)]


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
    numbers = uniform(batch.keys, stream, (config.count, _NUMBERS))
    by_side: dict[int, list[tuple[ViewConfig, Drawn]]] = {}
    start = 0
    for kind in config.views:
        alike = numbers[:, start : start + kind.count].transpose(0, 1).flatten(0, 1)
        drawn = draw(alike, batch.sizes.repeat(kind.count, 1), kind)
        views = by_side.setdefault(kind.size or presentation.image_size, [])
        views += [(kind, part) for part in drawn.parts(kind.count)]
        start += kind.count
    return [render(batch.images, views, side, presentation) for side, views in by_side.items()]


def draw(numbers: Tensor, sizes: Tensor, kind: ViewConfig) -> Drawn:
    """Parameters of one view of pictures of `sizes` (b, 2), from uniform numbers (b, 32) in [0, 1)."""
    box, numbers = numbers[:, :BOX_NUMBERS], numbers[:, BOX_NUMBERS:]
    jitter = torch.tensor([1.0, 1.0, 1.0, 0.0], device=sizes.device).expand(len(sizes), 4)
    if kind.jitter is not None:
        ranges = (kind.jitter.brightness, kind.jitter.contrast, kind.jitter.saturation)
        bounds = [(max(0.0, 1.0 - r), 1.0 + r) for r in ranges] + [(-kind.jitter.hue, kind.jitter.hue)]
        low, high = torch.tensor(bounds, device=sizes.device).unbind(dim=1)
        strengths = low + numbers[:, 1:5] * (high - low)
        jitter = torch.where(numbers[:, :1] < kind.jitter.probability, strengths, jitter)
    sigma = torch.zeros(len(sizes), device=sizes.device)
    if kind.blur is not None:
        least, most = kind.blur.sigma
        sigma = torch.where(numbers[:, 6] < kind.blur.probability, least + numbers[:, 7] * (most - least), sigma)
    return Drawn(
        boxes=boxes_of(box, sizes, kind.scale, kind.ratio),
        flip=numbers[:, 9] < kind.flip,
        jitter=jitter,
        grey=numbers[:, 5] < kind.grey,
        sigma=sigma,
        solarize=numbers[:, 8] < kind.solarize,
    )


def render(images: Tensor, views: list[tuple[ViewConfig, Drawn]], side: int, presentation: Presentation) -> Tensor:
    """Views of one size: crop and flip, jitter (brightness, contrast, saturation, hue), grey, blur, solarise,
    normalise; float32 (views, b, 3, side, side) from uint8 (b, 3, height, width).

    On a CPU the work is done a few pictures at a time (`cpu.py`), elsewhere on the whole batch; both follow the
    same formulas, and agree to 1e-5 behind the same crop.
    """
    if kernels(images.device) == "cpu":
        return _render_each(images, views, side, presentation)
    return torch.stack([_render(images, drawn, kind, side, presentation) for kind, drawn in views])


def _render(images: Tensor, drawn: Drawn, kind: ViewConfig, side: int, presentation: Presentation) -> Tensor:
    planes = planes_of(crop_resize(images, drawn.boxes, side, drawn.flip, presentation.interpolation))
    if kind.jitter is not None:
        planes = jitter(planes, drawn.jitter)
    if kind.grey:
        planes = to_grey(planes, drawn.grey)
    view = torch.stack(planes, dim=1)
    if kind.blur is not None:
        view = gaussian_blur(view, drawn.sigma, kind.blur.sigma[1])
    if kind.solarize:
        view = solarize(view, drawn.solarize)
    return normalize(view, presentation.mean, presentation.std)


def _render_each(
    images: Tensor, views: list[tuple[ViewConfig, Drawn]], side: int, presentation: Presentation
) -> Tensor:
    drawn = [drawn for _, drawn in views]
    flip = torch.stack([d.flip for d in drawn])
    if not large(images):
        images = torch.stack([crop_resize(images, d.boxes, side, d.flip, presentation.interpolation) for d in drawn])
        flip = torch.zeros_like(flip)
    largest = max(0.0 if kind.blur is None else kind.blur.sigma[1] for kind, _ in views)
    strengths = Strengths(
        jitter=torch.stack([d.jitter for d in drawn]),
        flags=torch.stack(
            [flip, torch.stack([d.grey for d in drawn]), torch.stack([d.solarize for d in drawn])], dim=-1
        ),
        weights=taps(torch.cat([d.sigma for d in drawn]), largest).unflatten(0, (len(drawn), -1)),
    )
    boxes = torch.stack([d.boxes for d in drawn])
    mean, std = presentation.mean, presentation.std
    return views_each(images, boxes, strengths, side, presentation.interpolation, mean, std)
