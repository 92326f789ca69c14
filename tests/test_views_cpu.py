"""Laws of views made picture by picture on a CPU: those of the batched ones, in torch, which they must equal."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_augmentation import MULTI_CROP, batch_of, floats, keys
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from torchvision.transforms.v2 import functional as functional_v2

from data.batch import ImageBatch
from data.keyed import uniform
from pretrain.encoders.vision import VisionConfig
from pretrain.views import (
    BlurConfig,
    Interpolation,
    ViewConfig,
    ViewsConfig,
    crop_resize,
    flips,
    make_views,
    pixels,
    random_resized_crop_boxes,
)
from pretrain.views.blur import taps
from pretrain.views.color import jitter, planes_of, solarize, to_grey
from pretrain.views.cpu import LARGE, Strengths, crop_each, views_each
from pretrain.views.make import Drawn, _render, draw, render

CANVAS = LARGE + 36


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("side", [1, 2, 7, 16, 33, 70])
@pytest.mark.parametrize("canvas", [24, CANVAS])
def test_views_in_pieces_are_those_of_the_whole_batch(side: int, canvas: int) -> None:
    """The way of a CPU and that of other devices."""
    batch = batch_of(40, canvas)
    kind = ViewConfig(solarize=0.3, blur=BlurConfig(sigma=(0.1, 3.0)))
    drawn, vision = draw(uniform(batch.keys, "views", (32,)), batch.sizes, kind), VisionConfig()
    ours = render(batch.images, [(kind, drawn)], side, vision)[0]
    theirs = _render(batch.images, drawn, kind, side, vision)
    # A value within rounding of 0.5 may be inverted in one and not in the other: few, and by a lot.
    close = torch.isclose(ours, theirs, atol=1e-4, rtol=0)
    assert close.float().mean() > 0.9995
    assert close[~drawn.solarize].all()


@pytest.mark.parametrize("side", [1, 2, 7, 37, 96])
@pytest.mark.parametrize("canvas", [24, CANVAS])
def test_compiled_views_have_the_bits_of_the_formulas(side: int, canvas: int) -> None:
    """At sizes that no vector divides, blurred beyond the picture, and with each operation alone and beside others."""
    batch, vision = batch_of(40, canvas), VisionConfig()
    blur = BlurConfig(sigma=(0.1, 3.0), probability=0.7)
    kinds = [ViewConfig(solarize=0.5, grey=0.5, blur=blur), ViewConfig(jitter=None, blur=blur), ViewConfig(blur=None)]
    for number, kind in enumerate(kinds):
        drawn = draw(uniform(batch.keys, f"view {number}", (32,)), batch.sizes, kind)
        made = render(batch.images, [(kind, drawn)], side, vision)[0]
        assert torch.equal(made, by_formulas(batch, drawn, side, vision))


def by_formulas(batch: ImageBatch, drawn: Drawn, side: int, vision: VisionConfig) -> torch.Tensor:
    """What `color.py` and `blur.py` say, operation by operation, on tensors."""
    if max(batch.images.shape[2:]) > LARGE:
        crops = crop_each(batch.images, drawn.boxes, side, vision.interpolation)
        crops = torch.where(drawn.flip[:, None, None, None], crops.flip(3), crops)
    else:
        crops = crop_resize(batch.images, drawn.boxes, side, drawn.flip, vision.interpolation)
    colors = torch.stack(to_grey(jitter(planes_of(crops), drawn.jitter), drawn.grey), dim=1)
    view = solarize(blurred_by_taps(colors, taps(drawn.sigma, 3.0)), drawn.solarize)
    return (view - torch.tensor(vision.mean)[:, None, None]) * (1.0 / torch.tensor(vision.std))[:, None, None]


def blurred_by_taps(images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows, then columns; reflected at the borders, and added up from the middle outwards."""
    for axis in (2, 3):
        side = images.shape[axis]
        weighed = weights[:, 0, None, None, None] * images
        for k in range(1, weights.shape[1]):
            places = (torch.arange(side) + torch.tensor([[-k], [k]])).abs() % max(1, 2 * (side - 1))
            before, after = (images.index_select(axis, p) for p in torch.minimum(places, 2 * (side - 1) - places))
            weighed = weighed + weights[:, k, None, None, None] * (before + after)
        images = weighed
    return images


def test_views_are_compiled_where_no_folder_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(cache: bool = False, **options: Any) -> Callable[[Any], Any]:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(**options)

    monkeypatch.setattr(pixels, "njit", njit)
    assert pixels._kept(lambda x: x + 1)(1) == 2


def test_parameters_that_change_nothing_change_no_bit() -> None:
    """Whatever is drawn for the pictures beside them."""
    pictures, none = floats(3), torch.zeros(1, 3)
    strengths = Strengths(
        jitter=torch.tensor([[[1.0, 1.0, 1.0, 0.0], [0.5, 1.5, 0.5, 0.1], [1.0, 1.0, 1.0, 0.0]]]),
        flags=torch.zeros(1, 3, 3, dtype=torch.bool),
        weights=taps(torch.tensor([0.0, 1.0, 0.0]), 1.0)[None],
    )
    made = views_each(pictures[None], none, strengths, 20, "bilinear")[0]
    assert torch.equal(made[::2], pictures[::2])
    assert not torch.equal(made[1], pictures[1])


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_large_crop_is_torchvision_s_of_bytes(mode: Interpolation) -> None:
    batch = batch_of(12, CANVAS)
    boxes = random_resized_crop_boxes(batch.keys, batch.sizes, scale=(0.1, 1.0))
    mirrored = flips(batch.keys)
    ours = crop_resize(batch.images, boxes, 48, mirrored, mode)
    for image, box, mirror, view in zip(batch.images, boxes.tolist(), mirrored, ours, strict=True):
        theirs = functional_v2.resized_crop(image, *box, [48, 48], InterpolationMode(mode), antialias=True)
        assert torch.equal(view, (TF.hflip(theirs) if mirror else theirs) / 255)


def test_a_large_bilinear_crop_is_pillow_s() -> None:
    batch = batch_of(12, CANVAS)
    boxes = random_resized_crop_boxes(batch.keys, batch.sizes, scale=(0.1, 1.0))
    for image, box, view in zip(
        batch.images, boxes.tolist(), crop_resize(batch.images, boxes, 48, None, "bilinear"), strict=True
    ):
        cut = TF.to_pil_image(TF.crop(image, *box))
        theirs = TF.pil_to_tensor(cut.resize((48, 48), Image.Resampling.BILINEAR)).float()
        assert_close(view * 255, theirs, atol=1.01, rtol=0)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_large_views_have_the_same_bits_in_any_batch(parts: list[int]) -> None:
    batch, vision = batch_of(sum(parts), CANVAS), VisionConfig(image_size=32)
    joined = make_views(batch, MULTI_CROP, vision)
    starts = np.cumsum([0, *parts])
    split = [make_views(batch[slice(a, b)], MULTI_CROP, vision) for a, b in pairwise(starts)]
    for number, whole in enumerate(joined):
        assert torch.equal(torch.cat([views[number] for views in split], dim=1), whole)


def test_neither_threads_nor_strides_change_a_bit(threads) -> None:
    batch, vision = batch_of(9, CANVAS), VisionConfig(image_size=32)
    threads(1)
    expected = make_views(batch, MULTI_CROP, vision)
    interleaved = ImageBatch(**{**vars(batch), "images": batch.images.contiguous(memory_format=torch.channels_last)})
    padded = torch.zeros(9, 3, CANVAS, CANVAS + 5, dtype=torch.uint8)[..., :CANVAS].copy_(batch.images)
    for count in (1, 2, 3):
        threads(count)
        for same in (batch, interleaved, ImageBatch(**{**vars(batch), "images": padded})):
            for ours, theirs in zip(make_views(same, MULTI_CROP, vision), expected, strict=True):
                assert torch.equal(ours, theirs)


def test_mixed_precision_does_not_reach_large_views() -> None:
    batch, vision = batch_of(3, CANVAS), VisionConfig(image_size=32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = make_views(batch, MULTI_CROP, vision)
    for ours, theirs in zip(mixed, make_views(batch, MULTI_CROP, vision), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_a_compiled_step_sees_views_as_one_graph() -> None:
    batch, vision = batch_of(4, CANVAS), VisionConfig(image_size=16)
    config = ViewsConfig(views=[ViewConfig(solarize=0.5)])

    def step(images: torch.Tensor, sizes: torch.Tensor, keys: torch.Tensor) -> list[torch.Tensor]:
        return make_views(ImageBatch(images, sizes, keys, keys, keys), config, vision)

    whole = torch.compile(step, backend="aot_eager", fullgraph=True)(batch.images, batch.sizes, batch.keys)
    for ours, theirs in zip(whole, make_views(batch, config, vision), strict=True):
        assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_keys_alone_decide() -> None:
    """Another sample's key gives another view of the same picture."""
    batch = batch_of(1, CANVAS)
    other = ImageBatch(**{**vars(batch), "keys": keys(2)[1:]})
    vision = VisionConfig(image_size=32)
    assert not torch.equal(make_views(batch, MULTI_CROP, vision)[0], make_views(other, MULTI_CROP, vision)[0])
