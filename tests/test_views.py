"""Laws of views: torchvision's crops, one sample at a time, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from data.keyed import sample_keys
from pretrain.views import Interpolation, center_boxes, crop_resize, flips, normalize, random_resized_crop_boxes

CANVAS = 48
MODES: dict[Interpolation, InterpolationMode] = {
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(sample_keys(seed, 0, np.arange(count, dtype=np.int64)))


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth colours with noise, of different sizes on one canvas."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (count, 3, CANVAS, CANVAS), generator=generator, dtype=torch.uint8)
    sizes = torch.randint(20, CANVAS + 1, (count, 2), generator=generator)
    for image, (height, width) in zip(noise, sizes, strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    return noise, sizes


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 64])
def test_crop_resize_is_torchvision_s_antialiased_resized_crop(mode: Interpolation, size: int) -> None:
    images, sizes = pictures(24)
    boxes, mirrored = random_resized_crop_boxes(keys(24), sizes, scale=(0.1, 1.0)), flips(keys(24))
    assert mirrored.any()
    assert not mirrored.all()
    ours = crop_resize(images, boxes, size, mirrored, mode)
    for image, box, mirror, view in zip(images, boxes.tolist(), mirrored, ours, strict=True):
        theirs = TF.resized_crop(image.float() / 255, *box, [size, size], MODES[mode], antialias=True).clamp(0, 1)
        assert_close(view, TF.hflip(theirs) if mirror else theirs, atol=2e-3, rtol=0)


def test_a_view_does_not_depend_on_the_batch_around_it() -> None:
    images, sizes = pictures(12)

    def view(part: slice) -> torch.Tensor:
        boxes = random_resized_crop_boxes(keys(12)[part], sizes[part])
        return crop_resize(images[part], boxes, 24, flips(keys(12)[part]))

    joined = view(slice(None))
    for step in (1, 3, 5):
        parts = [view(slice(start, start + step)) for start in range(0, 12, step)]
        assert torch.equal(torch.cat(parts), joined)


def test_mixed_precision_does_not_reach_the_views() -> None:
    images, sizes = pictures(4)
    boxes = center_boxes(sizes)
    with torch.autocast("cpu", torch.bfloat16):
        view = crop_resize(images, boxes, 16)
    assert view.dtype == torch.float32
    assert torch.equal(view, crop_resize(images, boxes, 16))


def test_boxes_follow_random_resized_crop() -> None:
    count, scale, ratio = 20_000, (0.2, 1.0), (3 / 4, 4 / 3)
    sizes = torch.full((count, 2), 1000)
    top, left, height, width = random_resized_crop_boxes(keys(count), sizes, scale, ratio).unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 1000).all()
    assert (left + width <= 1000).all()
    area, aspect = height * width / 1e6, width / height
    assert area.min() > scale[0] - 0.005
    assert aspect.min() > ratio[0] - 0.005
    assert aspect.max() < ratio[1] + 0.005
    # Areas up to 0.7 always fit at any allowed aspect, so there nothing is drawn again: uniform.
    small = area[area < 0.7]
    histogram = torch.histc(small, bins=5, min=0.2, max=0.7) / len(small)
    assert_close(histogram, torch.full((5,), 0.2), atol=0.015, rtol=0)
    # Aspects are log-uniform and places uniform over what is free.
    assert aspect[area < 0.7].log().mean().abs() < 0.01
    free = (1000 - width) > 100
    assert abs((left / (1000 - width + 1))[free].mean() - 0.5) < 0.01


def test_a_box_may_lie_at_every_place() -> None:
    sizes = torch.full((3000, 2), 3)
    boxes = random_resized_crop_boxes(keys(3000), sizes, scale=(1 / 9, 1 / 9), ratio=(1.0, 1.0))
    assert (boxes[:, 2:] == 1).all()
    places = torch.bincount(boxes[:, 0] * 3 + boxes[:, 1], minlength=9) / 3000
    assert_close(places, torch.full((9,), 1 / 9), atol=0.025, rtol=0)


def test_distribution_of_boxes_is_torchvision_s() -> None:
    from torchvision.transforms import RandomResizedCrop

    count, shape = 4000, (60, 100)
    ours = random_resized_crop_boxes(keys(count), torch.tensor([shape]).expand(count, 2)).double()
    torch.manual_seed(0)
    image = torch.zeros(3, *shape)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)])
    spread = theirs.double().std(0)
    assert_close(ours.mean(0), theirs.double().mean(0), atol=5 * spread.max().item() / count**0.5, rtol=0)
    assert_close(ours.std(0), spread, atol=0, rtol=0.06)


@pytest.mark.parametrize(
    ("size", "box"),
    [((4, 400), (0, 197, 4, 5)), ((400, 4), (197, 0, 5, 4)), ((1, 1), (0, 0, 1, 1)), ((1, 300), (0, 149, 1, 1))],
)
def test_extreme_pictures_fall_back_to_a_central_box(size: tuple[int, int], box: tuple[int, ...]) -> None:
    drawn = random_resized_crop_boxes(keys(50), torch.tensor([size]).expand(50, 2), scale=(0.5, 1.0))
    assert torch.equal(drawn, torch.tensor([box]).expand(50, 4))


def test_a_narrow_range_of_aspects_never_gives_an_empty_box() -> None:
    boxes = random_resized_crop_boxes(keys(8), torch.tensor([[1, 9]]).expand(8, 2), ratio=(0.1, 0.3))
    assert (boxes[:, 2:] >= 1).all()


def test_center_boxes_are_central_squares() -> None:
    sizes = torch.tensor([[10, 20], [21, 10], [7, 7]])
    assert center_boxes(sizes).tolist() == [[0, 5, 10, 10], [5, 0, 10, 10], [0, 0, 7, 7]]
    assert center_boxes(sizes, 0.5).tolist() == [[2, 7, 5, 5], [8, 2, 5, 5], [1, 1, 4, 4]]


def test_a_whole_picture_at_its_own_size_is_itself() -> None:
    images, _ = pictures(3)
    boxes = torch.tensor([[0, 0, CANVAS, CANVAS]]).expand(3, 4)
    assert_close(crop_resize(images, boxes, CANVAS), images / 255, atol=1e-6, rtol=0)


def test_normalize_is_torchvision_s() -> None:
    images = torch.rand(2, 3, 4, 4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    assert_close(normalize(images, mean, std), TF.normalize(images, mean, std))


@pytest.mark.gpu
def test_boxes_and_flips_are_equal_on_the_gpu() -> None:
    sizes = torch.randint(1, 500, (10_000, 2), generator=torch.Generator().manual_seed(0))
    boxes = random_resized_crop_boxes(keys(10_000).cuda(), sizes.cuda())
    assert torch.equal(boxes.cpu(), random_resized_crop_boxes(keys(10_000), sizes))
    assert torch.equal(flips(keys(10_000).cuda()).cpu(), flips(keys(10_000)))
