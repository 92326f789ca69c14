"""Laws of views: torchvision's operations with the same parameters, the same bits in any batch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.transforms import functional as TF

from data.batch import ImageBatch
from data.keyed import sample_keys, uniform
from pretrain.encoders.vision import VisionConfig
from pretrain.views import BlurConfig, JitterConfig, ViewConfig, ViewsConfig, make_views
from pretrain.views.blur import gaussian_blur, taps
from pretrain.views.color import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    grey_of,
    solarize,
    to_grey,
)
from pretrain.views.cpu import Strengths, views_each
from pretrain.views.make import draw

VISION = VisionConfig(image_size=16)
MULTI_CROP = ViewsConfig(
    views=[
        ViewConfig(count=1, blur=BlurConfig(probability=1.0)),
        ViewConfig(count=1, solarize=0.5),
        ViewConfig(count=3, size=8, scale=(0.05, 0.4)),
    ]
)


def keys(count: int) -> torch.Tensor:
    return torch.from_numpy(sample_keys(0, 0, np.arange(count, dtype=np.int64)))


def batch_of(count: int, canvas: int = 24) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 3, canvas, canvas), generator=generator, dtype=torch.uint8)
    sizes = torch.randint(canvas // 2, canvas + 1, (count, 2), generator=generator)
    nothing = torch.zeros(count, dtype=torch.int64)
    return ImageBatch(images=images, sizes=sizes, labels=nothing, keys=keys(count), ids=nothing)


def floats(count: int, side: int = 20) -> torch.Tensor:
    """Pictures with flat, grey, black and saturated places among random colours."""
    pictures = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(2))
    pictures[:, :, :2], pictures[:, :, 2:4], pictures[:, 1:, 4:5] = 0.0, 1.0, 0.0
    pictures[:, :, 6] = pictures[:, :1, 6]
    return pictures


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"),
    [
        (adjust_brightness, TF.adjust_brightness, 0.0, 2.0),
        (adjust_contrast, TF.adjust_contrast, 0.0, 2.0),
        (adjust_saturation, TF.adjust_saturation, 0.0, 2.0),
        (adjust_hue, TF.adjust_hue, -0.5, 0.5),
    ],
)
def test_each_adjustment_is_torchvision_s(ours, theirs, low: float, high: float) -> None:
    pictures, strength = floats(21), torch.linspace(low, high, 21)
    results = torch.stack(ours(pictures.unbind(1), strength), dim=1)
    for picture, value, result in zip(pictures, strength.tolist(), results, strict=True):
        assert_close(result, theirs(picture, value), atol=2e-6, rtol=0)


@pytest.mark.parametrize("operation", [adjust_brightness, adjust_contrast, adjust_saturation])
def test_a_factor_of_one_changes_no_bit(operation) -> None:
    assert torch.equal(torch.stack(operation(floats(3).unbind(1), torch.ones(3)), dim=1), floats(3))


def test_zero_hue_and_zero_sigma_change_no_bit() -> None:
    assert torch.equal(torch.stack(adjust_hue(floats(3).unbind(1), torch.zeros(3)), dim=1), floats(3))
    assert torch.equal(gaussian_blur(floats(3), torch.zeros(3), 2.0), floats(3))
    assert torch.equal(compiled_blur(floats(3), torch.zeros(3)), floats(3))


def compiled_blur(pictures: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """A CPU's blur and nothing else."""
    none, nothing = torch.zeros(1, len(pictures), 3, dtype=torch.bool), torch.tensor([1.0, 1.0, 1.0, 0.0])
    strengths = Strengths(nothing.expand(1, len(pictures), 4), none, taps(sigma, 2.0)[None])
    return views_each(pictures[None], none, strengths, pictures.shape[-1], "bilinear")[0]


def test_grey_and_solarize_are_torchvision_s() -> None:
    pictures, chosen = floats(4), torch.tensor([True, False, True, False])
    assert_close(grey_of(pictures.unbind(1))[:, None], TF.rgb_to_grayscale(pictures), atol=1e-6, rtol=0)
    grey = torch.stack(to_grey(pictures.unbind(1), chosen), dim=1)
    assert_close(grey[::2], TF.rgb_to_grayscale(pictures, 3)[::2], atol=1e-6, rtol=0)
    assert torch.equal(grey[1::2], pictures[1::2])
    assert torch.equal(solarize(pictures, chosen)[::2], TF.solarize(pictures, 0.5)[::2])
    assert torch.equal(solarize(pictures, chosen)[1::2], pictures[1::2])


@pytest.mark.parametrize("side", [20, 40])
def test_blur_is_torchvision_s(side: int) -> None:
    pictures, sigma = floats(6, side), torch.tensor([0.1, 0.3, 0.7, 1.2, 1.7, 2.0])
    by_products = gaussian_blur(pictures, sigma, 2.0)
    for ours, within in ((by_products, 1e-6), (compiled_blur(pictures, sigma), 5e-6)):
        for picture, value, result in zip(pictures, sigma.tolist(), ours, strict=True):
            assert_close(result, TF.gaussian_blur(picture, [17, 17], [value, value]), atol=within, rtol=0)


def test_views_come_by_size() -> None:
    global_views, local_views = make_views(batch_of(5), MULTI_CROP, VISION)
    assert global_views.shape == (2, 5, 3, 16, 16)
    assert local_views.shape == (3, 5, 3, 8, 8)
    flat = [*global_views, *local_views]
    for i, view in enumerate(flat):
        assert view.isfinite().all()
        assert not any(torch.equal(view, other) for other in flat[i + 1 :])


def test_another_stream_gives_other_views() -> None:
    batch = batch_of(2)
    assert not torch.equal(make_views(batch, MULTI_CROP, VISION)[0], make_views(batch, MULTI_CROP, VISION, "b")[0])


@settings(deadline=None, max_examples=15)
@given(parts=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_views_have_the_same_bits_in_any_batch(parts: list[int]) -> None:
    batch = batch_of(sum(parts))
    joined = make_views(batch, MULTI_CROP, VISION)
    starts = np.cumsum([0, *parts])
    split = [make_views(batch[slice(a, b)], MULTI_CROP, VISION) for a, b in pairwise(starts)]
    for number, whole in enumerate(joined):
        assert torch.equal(torch.cat([views[number] for views in split], dim=1), whole)


@pytest.mark.gpu
def test_views_on_the_gpu_are_those_of_the_cpu() -> None:
    batch = batch_of(32)
    expected = make_views(batch, MULTI_CROP, VISION)
    step = torch.compile(lambda batch: make_views(batch, MULTI_CROP, VISION), fullgraph=True)
    for found in (make_views(batch.to("cuda"), MULTI_CROP, VISION), step(batch.to("cuda"))):
        for ours, theirs in zip(found, expected, strict=True):
            # A value within rounding of 0.5 may be solarised on one device and not on the other.
            assert torch.isclose(ours.cpu(), theirs, atol=1e-4, rtol=0).float().mean() > 0.9995


def test_drawn_parameters_follow_the_configuration() -> None:
    count = 40_000
    kind = ViewConfig(flip=0.3, grey=0.2, solarize=0.1, jitter=JitterConfig(brightness=0.4, contrast=1.5))
    drawn = draw(uniform(keys(count), "views", (32,)), torch.full((count, 2), 100), kind)
    for chosen, share in ((drawn.flip, 0.3), (drawn.grey, 0.2), (drawn.solarize, 0.1), (drawn.sigma > 0, 0.5)):
        assert abs(chosen.double().mean() - share) < 5 * (share * (1 - share) / count) ** 0.5
    jittered = drawn.jitter[:, 3] != 0
    assert abs(jittered.double().mean() - 0.8) < 0.01
    assert (drawn.jitter[~jittered] == torch.tensor([1.0, 1.0, 1.0, 0.0])).all()
    bounds = [(0.6, 1.4), (0.0, 2.5), (0.2, 1.8), (-0.2, 0.2)]
    columns = [*drawn.jitter[jittered].T, drawn.sigma[drawn.sigma > 0]]
    for values, (low, high) in zip(columns, [*bounds, (0.1, 2.0)], strict=True):
        assert values.min() >= low
        assert values.max() <= high
        histogram = torch.histc(values, bins=8, min=low, max=high) / len(values)
        assert_close(histogram, torch.full((8,), 1 / 8), atol=0.01, rtol=0)
    # Independent of each other: no pair of strengths is correlated.
    correlation = torch.corrcoef(drawn.jitter[jittered].T.double()) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 0.03
