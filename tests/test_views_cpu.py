"""Laws of views made picture by picture on a CPU: those of the batched ones, in torch, which they must equal."""

from __future__ import annotations

from itertools import pairwise

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
    random_resized_crop_boxes,
)
from pretrain.views import make as making
from pretrain.views.cpu import LARGE, Strengths, views_each
from pretrain.views.make import draw, render
from pretrain.views.native import library

CANVAS = LARGE + 36
needs_compiler = pytest.mark.skipif(library() is None, reason="there is no C compiler here")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("side", [1, 2, 7, 16, 33, 70])
@pytest.mark.parametrize("canvas", [24, CANVAS])
def test_compiled_views_are_torch_s(side: int, canvas: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(40, canvas)
    kind = ViewConfig(solarize=0.3, blur=BlurConfig(sigma=(0.1, 3.0)))
    drawn, vision = draw(uniform(batch.keys, "views", (32,)), batch.sizes, kind), VisionConfig()
    ours = render(batch.images, [(kind, drawn)], side, vision)[0]
    monkeypatch.setattr(making, "compiled", lambda: False)
    theirs = render(batch.images, [(kind, drawn)], side, vision)[0]
    # A value within rounding of 0.5 may be inverted in one and not in the other: few, and by a lot.
    close = torch.isclose(ours, theirs, atol=1e-4, rtol=0)
    assert close.float().mean() > 0.9995
    assert close[~drawn.solarize].all()


@needs_compiler
def test_parameters_that_change_nothing_change_no_bit() -> None:
    pictures = floats(3)
    nothing = Strengths.only_flip(torch.zeros(1, 3, dtype=torch.bool))
    assert torch.equal(views_each(pictures[None], torch.zeros(1, 3, 4), nothing, 20, "bilinear")[0], pictures)


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


@pytest.mark.parametrize("native", [True, False])
def test_a_compiled_step_sees_views_as_one_graph(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if native and library() is None:
        pytest.skip("there is no C compiler here")
    if not native:
        monkeypatch.setattr(making, "compiled", lambda: False)
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
