"""Laws of masks and mixing: exact counts, no leaks, the drawn distributions, the same bits in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from data.errors import UserError
from data.keyed import sample_keys
from pretrain.views import (
    BlockwiseMask,
    MixConfig,
    MultiBlockMask,
    blockwise,
    exactly_k,
    mix,
    mixed_targets,
    multi_block,
)
from pretrain.views.mixing import beta


def keys(count: int) -> torch.Tensor:
    return torch.from_numpy(sample_keys(3, 0, np.arange(count, dtype=np.int64)))


@pytest.mark.parametrize("hidden", [0, 1, 37, 49])
def test_exactly_k_hides_k_and_every_patch_as_often(hidden: int) -> None:
    mask = exactly_k(keys(4000), 49, hidden)
    assert (mask.sum(dim=1) == hidden).all()
    share = torch.full((49,), hidden / 49)
    assert_close(mask.float().mean(dim=0), share, atol=0.04, rtol=0)


def test_blockwise_masks_have_the_drawn_counts() -> None:
    config, grid = BlockwiseMask(ratio=(0.1, 0.5), probability=0.5), (14, 14)
    counts = blockwise(keys(3000), grid, config).sum(dim=1)
    masked = counts[counts > 0]
    assert abs(len(masked) / 3000 - 0.5) < 0.05
    assert masked.min() >= round(0.1 * 196)
    assert masked.max() <= round(0.5 * 196)
    histogram = torch.histc(masked / 196.0, bins=4, min=0.1, max=0.5) / len(masked)
    assert_close(histogram, torch.full((4,), 0.25), atol=0.06, rtol=0)


def test_blockwise_masks_are_blocks() -> None:
    """A hidden patch has more hidden neighbours than in a mask of single patches."""
    config = BlockwiseMask(ratio=(0.4, 0.4), probability=1.0)
    blocks = blockwise(keys(200), (14, 14), config).view(-1, 14, 14)
    single = exactly_k(keys(200), 196, int(blocks[0].sum())).view(-1, 14, 14)

    def together(mask: torch.Tensor) -> float:
        return ((mask[:, 1:] & mask[:, :-1]).sum() / mask[:, 1:].sum()).item()

    assert abs(together(single) - 0.4) < 0.03
    assert together(blocks) > 0.7


@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (16, 10), (4, 4)])
def test_multi_block_masks_have_fixed_numbers_and_do_not_leak(grid: tuple[int, int]) -> None:
    config = MultiBlockMask()
    context, targets = multi_block(keys(500), grid, config)
    patches = grid[0] * grid[1]
    assert context.shape == (500, round(config.context_share * patches))
    assert targets.shape == (500, config.targets, round(config.target_share * patches))
    for numbers in (context, targets):
        assert (numbers.diff(dim=-1) > 0).all()  # ascending, none twice
        assert numbers.min() >= 0
        assert numbers.max() < patches
    assert not (context[:, :, None] == targets.flatten(1)[:, None]).any()


def test_targets_are_blocks_anywhere() -> None:
    _, targets = multi_block(keys(2000), (14, 14), MultiBlockMask())
    rows, columns = targets // 14, targets % 14
    tall, wide = (a.amax(dim=-1) - a.amin(dim=-1) + 1 for a in (rows, columns))
    assert (tall * wide - targets.shape[-1] < wide).all()  # only one row may be cut short
    assert (tall / wide).min() > 0.6
    assert (tall / wide).max() < 1.75
    seen = torch.bincount(targets.flatten(), minlength=196)
    assert (seen > 0).all()


def test_a_layout_always_fits() -> None:
    """So much context that targets apart from each other are impossible: they fall together."""
    config = MultiBlockMask(targets=4, target_share=0.25, context_share=0.75)
    context, targets = multi_block(keys(64), (8, 8), config)
    assert (targets == targets[:, :1]).all()
    assert context.shape[1] + targets.shape[2] == 64
    with pytest.raises(UserError, match="context_share"):
        multi_block(keys(2), (8, 8), MultiBlockMask(target_share=0.5, context_share=0.6))


def test_masks_have_the_same_bits_in_any_batch() -> None:
    def masks(part: torch.Tensor) -> list[torch.Tensor]:
        return [exactly_k(part, 36, 9), blockwise(part, (6, 6), BlockwiseMask()), *multi_block(part, (6, 6), MIXED)]

    joined = masks(keys(33))
    for step in (1, 2, 7):
        parts = [masks(part) for part in keys(33).split(step)]
        for number, whole in enumerate(joined):
            assert torch.equal(torch.cat([part[number] for part in parts]), whole)


MIXED = MultiBlockMask(target_share=0.2, context_share=0.4)


@pytest.mark.parametrize("parameter", [0.2, 0.8, 1.0])
def test_beta_is_beta(parameter: float) -> None:
    from scipy.stats import beta as law
    from scipy.stats import kstest

    assert kstest(beta(keys(20_000), parameter, "b").numpy(), law(parameter, parameter).cdf).pvalue > 1e-3


def test_mixup_and_cutmix_mix_neighbours_by_their_share() -> None:
    images = torch.rand(64, 3, 16, 16)
    for config, cut in ((MixConfig(cutmix=0), False), (MixConfig(mixup=0), True)):
        mixed, partner, share = mix(images, keys(64), config)
        assert partner.tolist() == [i ^ 1 for i in range(64)]
        assert torch.equal(share[::2], share[1::2])
        if cut:
            own, other = mixed == images, mixed == images[partner]
            assert (own | other).all()
            assert_close(own.float().mean(dim=(1, 2, 3)), share, atol=1e-6, rtol=0)
        else:
            weight = share[:, None, None, None]
            assert_close(mixed, weight * images + (1 - weight) * images[partner])
    untouched, _, share = mix(images, keys(64), MixConfig(probability=0.0))
    assert torch.equal(untouched, images)
    assert (share == 1).all()


def test_mixing_has_the_same_bits_in_even_pieces_and_refuses_odd_ones() -> None:
    images = torch.rand(24, 3, 8, 8)
    joined = mix(images, keys(24), MixConfig())[0]
    parts = [mix(a, k, MixConfig())[0] for a, k in zip(images.split(6), keys(24).split(6), strict=True)]
    assert torch.equal(torch.cat(parts), joined)
    with pytest.raises(UserError, match="even"):
        mix(images[:3], keys(3), MixConfig())


def test_mixed_targets_are_soft_and_smooth() -> None:
    labels, partner, share = torch.tensor([0, 2]), torch.tensor([1, 0]), torch.tensor([0.75, 0.75])
    targets = mixed_targets(labels, partner, share, classes=4)
    assert_close(targets, torch.tensor([[0.75, 0, 0.25, 0], [0.25, 0, 0.75, 0]]))
    smooth = mixed_targets(labels, partner, share, classes=4, smoothing=0.1)
    assert_close(smooth, 0.9 * targets + 0.025)
