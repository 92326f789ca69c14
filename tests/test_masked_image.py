"""Laws of MAE: what is hidden stays hidden, the loss is the paper's, splits do not matter, it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from pretrain_kit import recipe
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.testing import assert_close

from data.batch import ImageBatch
from data.dataset import ShardedDataset
from data.errors import UserError
from data.keyed import permutation
from data.loader import Loader, sequential
from pretrain.build import build_objective
from pretrain.encoders.vision import VisionConfig
from pretrain.objectives.last_block import LastBlock
from pretrain.objectives.masked_image import MAEConfig, MaskedAutoencoder
from pretrain.optim import build_optimizer

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
PREFIXES: list[dict[str, Any]] = [
    {"class_token": False},
    {"class_token": True},
    {"class_token": True, "reg_tokens": 2},
    {"class_token": False, "reg_tokens": 1, "no_embed_class": True},
]


def mae(model_args: dict[str, Any] | None = None, image_size: int = 16, **settings: Any) -> MaskedAutoencoder:
    arguments = SMALL | {"patch_size": 4, "class_token": False} | (model_args or {})
    vision = VisionConfig(model="vit_tiny_patch16_224", image_size=image_size, model_args=arguments)
    torch.manual_seed(0)
    return MaskedAutoencoder(MAEConfig(decoder_width=16, decoder_depth=1, decoder_heads=2, **settings), vision)


def noise(count: int, canvas: int = 20) -> ImageBatch:
    generator = torch.Generator().manual_seed(1)
    return ImageBatch(
        images=torch.randint(0, 256, (count, 3, canvas, canvas), generator=generator, dtype=torch.uint8),
        sizes=torch.randint(12, canvas + 1, (count, 2), generator=generator),
        labels=torch.full((count,), -1),
        keys=torch.randint(-(2**62), 2**62, (count,), generator=generator),
        ids=torch.arange(count),
    )


def reference_loss(objective: MaskedAutoencoder, batch: ImageBatch) -> Tensor:
    """As facebookresearch/mae: unshuffle to full order, decode every token, mean over the removed patches."""
    images = objective.view(batch)
    encoder, positions = objective.encoder, objective.decoder_positions
    prefix = encoder.num_prefix_tokens
    order = permutation(batch.keys, "mask", objective.patches)
    restore = order.argsort(dim=1)
    tokens = encoder._pos_embed(encoder.patch_embed(images))
    kept = [
        torch.cat([row[:prefix], row[prefix:][o[: objective.visible]]]) for row, o in zip(tokens, order, strict=True)
    ]
    encoded = objective.decoder_embed(encoder.norm(encoder.blocks(torch.stack(kept))))
    hidden = objective.patches - objective.visible
    full = torch.cat([encoded[:, prefix:], objective.mask_token.expand(len(tokens), hidden, -1)], dim=1)
    full = torch.stack([row[r] for row, r in zip(full, restore, strict=True)]) + positions
    decoded = torch.cat([encoded[:, :prefix], full], dim=1)
    for block in objective.decoder:  # the reference makes every token's output, in the last block too
        whole = Block(objective.config.decoder_width, objective.config.decoder_heads, qkv_bias=True)
        whole.load_state_dict(block.state_dict())
        decoded = whole(decoded)
    predicted = objective.decoder_head(objective.decoder_norm(decoded))[:, prefix:]
    p, q = objective.patch
    target = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=q)
    if objective.config.normalize_targets:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    mask = torch.stack([(r >= objective.visible).float() for r in restore])
    loss = (predicted - target).square().mean(-1)
    return (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_each_key_hides_exactly_its_share(ratio: float) -> None:
    objective = mae(mask_ratio=ratio)
    output = objective(noise(5), 0.0)
    hidden = 16 - round(16 * (1 - ratio))
    assert objective.patches - objective.visible == hidden
    assert output.target_count == 5 * hidden
    orders = permutation(noise(200).keys, "mask", 16)
    assert (orders.sort(dim=1).values == torch.arange(16)).all()
    # Every patch is hidden about equally often.
    often = torch.stack([(orders[:, hidden:] == patch).any(1).float().mean() for patch in range(16)])
    assert (often - (16 - hidden) / 16).abs().max() < 0.15


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_encoder_never_sees_a_hidden_patch(prefix: dict[str, Any]) -> None:
    objective, batch = mae(prefix), noise(3)
    images = objective.view(batch).requires_grad_()
    order = permutation(batch.keys, "mask", objective.patches)
    encoded = objective.encode(images, order)
    assert encoded.shape == (3, objective.encoder.num_prefix_tokens + objective.visible, 24)
    encoded.square().sum().backward()
    assert images.grad is not None
    felt = rearrange(images.grad, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4).abs().sum(-1)
    for row, sequence in zip(felt, order, strict=True):
        assert (row[sequence[: objective.visible]] > 0).all()
        assert (row[sequence[objective.visible :]] == 0).all()


def test_predictions_depend_on_visible_patches_alone() -> None:
    objective, batch = mae(), noise(4)
    images = objective.view(batch)
    order = permutation(batch.keys, "mask", 16)
    patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4)

    def predicted(place: slice) -> Tensor:
        where = order[:, place, None].expand(-1, -1, 48)
        changed = patches.scatter(1, where, patches.gather(1, where) + 1)
        pictures = rearrange(changed, "b (h w) (p q c) -> b c (h p) (w q)", h=4, p=4, q=4)
        return objective.decode(objective.encode(pictures, order), order)

    plain = objective.decode(objective.encode(images, order), order)
    assert torch.equal(predicted(slice(objective.visible, None)), plain)
    assert not torch.allclose(predicted(slice(0, 1)), plain)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_loss_is_the_reference_implementation_s(prefix: dict[str, Any], normalize: bool) -> None:
    objective, batch = mae(prefix, normalize_targets=normalize), noise(6)
    output = objective(batch, 0.0)
    assert_close(output.loss_sum / output.target_count, reference_loss(objective, batch), atol=1e-5, rtol=1e-5)


def test_only_hidden_patches_are_scored() -> None:
    objective, batch = mae(), noise(4)
    scored: list[Tensor] = []
    targets = objective.targets

    def poisoned(images: Tensor, order: Tensor) -> Tensor:
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4).clone()
        for row, sequence in zip(patches, order, strict=True):
            row[sequence[: objective.visible]] = torch.nan
        scored.append(patches)
        return targets(rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=4, p=4, q=4), order)

    plain = objective(batch, 0.0).loss_sum
    objective.targets = poisoned  # type: ignore[method-assign]
    assert torch.equal(objective(batch, 0.0).loss_sum, plain)
    assert scored[0].isnan().any()


@pytest.mark.parametrize("prefix", PREFIXES[:3])
def test_microbatches_sum_to_the_joined_batch(prefix: dict[str, Any]) -> None:
    objective, batch = mae(prefix), noise(8)

    def summed(size: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        objective.zero_grad()
        outputs = [objective(batch[start : start + size], 0.0) for start in range(0, 8, size)]
        loss = torch.stack([o.loss_sum for o in outputs]).sum()
        loss.backward()
        grads = [p.grad.clone() for p in objective.parameters() if p.grad is not None]
        return loss.detach(), torch.stack([o.target_count for o in outputs]).sum(), grads

    joined = summed(8)
    for size in (1, 2, 4):
        assert_close(summed(size), joined, atol=1e-3, rtol=1e-4)


def test_patches_need_not_be_square() -> None:
    objective, batch = mae({"patch_size": [2, 8]}), noise(4)
    assert objective.patch == (2, 8)
    output = objective(batch, 0.0)
    assert_close(output.loss_sum / output.target_count, reference_loss(objective, batch), atol=1e-5, rtol=1e-5)
    assert [tuple(picture.shape) for picture in objective.reconstruct(batch)] == [(4, 3, 16, 16)] * 3


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch32_clip_224",
        "vit_base_patch16_siglip_224",
        "vit_so150m_patch16_reg4_gap_256",
        "vit_large_patch14_xp_224",
        "vit_small_r26_s32_224",
        "deit3_small_patch16_224",
        "vit_giant_patch14_dinov2",
    ],
)
def test_any_vit_of_timm_s_builds_and_runs_without_memory(name: str) -> None:
    size = 448 if "14" in name else 256
    with torch.device("meta"):
        objective = MaskedAutoencoder(MAEConfig(), VisionConfig(model=name, image_size=size))
        images = torch.zeros(2, 3, size, size)
        order = torch.zeros(2, objective.patches, dtype=torch.int64)
    predicted = objective.decode(objective.encode(images, order), order)
    p, q = objective.patch
    assert predicted.shape == (2, objective.patches - objective.visible, 3 * p * q)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "resnet18"}, "needs a ViT"),
        ({"model": "vit_tiny_patch61_224"}, "vit_tiny_patch16_224"),
        ({"model": "vit_tiny_patch16_224", "image_size": 30}, "no multiple"),
        ({"model": "vit_tiny_patch16_224", "image_size": 16}, "0 of 1 patches"),
        ({"model": "vit_tiny_patch16_224", "model_args": {"num_heads": 5}}, "refuses"),
        ({"model": "vit_tiny_patch16_224", "model_args": {"colour": 5}}, "colour"),
    ],
)
def test_encoders_that_do_not_fit_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        MaskedAutoencoder(MAEConfig(), VisionConfig(**settings))


def test_it_learns_and_reconstructs(digits: Path) -> None:
    dataset = ShardedDataset(digits / "train")
    train, held_out = dataset.split(0.1)
    wide = {"encoder.model_args": {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "class_token": False}}
    objective = build_objective(recipe("mae", digits / "train", wide))
    assert isinstance(objective, MaskedAutoencoder)
    batch = next(sequential(held_out, 100, canvas=8))

    @torch.no_grad()
    def held_out_loss() -> float:
        objective.eval()
        output = objective(batch, 1.0)
        objective.train()
        return (output.loss_sum / output.target_count).item()

    before = held_out_loss()
    config = recipe("mae", digits / "train").optimizer
    optimizer = build_optimizer(objective, config)
    for step, found in enumerate(Loader(train, 64, canvas=8)):
        if step == 150:
            break
        output = objective(found, step / 150)
        (output.loss_sum / output.target_count).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = held_out_loss()
    assert after < 0.75 * before, (before, after)
    images, masked, filled = objective.eval().reconstruct(batch)
    for picture in (images, masked, filled):
        assert picture.shape == (100, 3, 16, 16)
        assert 0 <= picture.min() <= picture.max() <= 1
    order = permutation(batch.keys, "mask", 16)
    patches = [rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4) for x in (images, masked, filled)]
    seen = order[:, : objective.visible, None].expand(-1, -1, 48)
    assert_close(patches[2].gather(1, seen), patches[0].gather(1, seen))
    guess = (patches[2] - patches[0]).square().mean()
    assert guess < 0.5 * (patches[1] - patches[0]).square().mean()


def test_a_step_is_one_graph_for_torch_compile() -> None:
    """Views, masks and loss compile without a break, and another batch or progress compiles nothing anew."""
    objective, batch = mae(), noise(4)
    later = noise(4)
    later.keys = later.keys + 1
    expected = [objective(b, p).loss_sum for b, p in ((batch, 0.1), (later, 0.7))]
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    first = compiled(batch, 0.1).loss_sum
    with torch.compiler.set_stance("fail_on_recompile"):
        second = compiled(later, 0.7).loss_sum
    assert_close([first, second], expected)


def test_the_last_block_is_timm_s_where_it_is_looked_at() -> None:
    """Outputs and gradients, from the same weights."""
    torch.manual_seed(0)
    last, whole = LastBlock(32, 4, wanted=5), Block(32, 4, qkv_bias=True)
    whole.load_state_dict(last.state_dict())
    tokens = torch.randn(3, 9, 32)
    ours, theirs = last(tokens), whole(tokens)[:, -5:]
    assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, mine), other in zip(last.named_parameters(), whole.parameters(), strict=True):
        assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)
