"""Laws of schedules and optimisers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.encoders.text import TextConfig, TextEncoder
from pretrain.encoders.vision import VisionConfig
from pretrain.objectives.masked_image import MAEConfig, MaskedAutoencoder
from pretrain.objectives.next_token import NextToken, NextTokenConfig
from pretrain.optim import OptimizerConfig, build_optimizer, parameter_groups, set_lr
from pretrain.pace import Pace
from pretrain.schedules import warmup_cosine

SHARE = st.floats(0, 1)


@given(SHARE, SHARE, SHARE)
def test_warmup_cosine_stays_between_its_ends(progress: float, warmup: float, final: float) -> None:
    assert -1e-12 <= warmup_cosine(progress, 1.0, warmup, final) <= 1.0 + 1e-12


@given(st.floats(0.01, 0.99), SHARE, SHARE, SHARE)
def test_warmup_cosine_rises_then_falls(warmup: float, final: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    first, second = (warmup_cosine(x, 1.0, warmup, final) for x in (low, high))
    if high <= warmup:
        assert first <= second + 1e-12
    if low >= warmup:
        assert second <= first + 1e-12


@given(st.floats(0.01, 0.99), SHARE)
def test_warmup_cosine_meets_its_marks(warmup: float, final: float) -> None:
    assert warmup_cosine(0.0, 2.0, warmup, final) == 0.0
    assert warmup_cosine(warmup, 2.0, warmup, final) == pytest.approx(2.0)
    assert warmup_cosine((1 + warmup) / 2, 2.0, warmup, final) == pytest.approx(1.0 + final / 2)
    assert warmup_cosine(1.0, 2.0, warmup, final) == pytest.approx(final)


def test_no_warmup_starts_at_the_peak_and_all_warmup_ends_there() -> None:
    assert warmup_cosine(0.0, 3.0, 0.0) == 3.0
    assert warmup_cosine(0.5, 3.0, 1.0) == 1.5


def objectives() -> list[torch.nn.Module]:
    arguments = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "reg_tokens": 2}
    vision = VisionConfig(model="vit_tiny_patch16_224", image_size=16, model_args=arguments, positions="learned")
    mae = MAEConfig(decoder_width=8, decoder_depth=1, decoder_heads=2)
    text = TextConfig(vocab_size=20, width=16, depth=1, heads=2, intermediate_size=16, context=8)
    return [MaskedAutoencoder(mae, vision), NextToken(TextEncoder(text), NextTokenConfig())]


@pytest.mark.parametrize("module", objectives(), ids=["mae", "next_token"])
def test_groups_cover_every_trainable_parameter_once(module: torch.nn.Module) -> None:
    decayed, spared = parameter_groups(module, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    found = [id(p) for group in (decayed, spared) for p in group["params"]]
    trainable = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    assert sorted(found) == sorted(trainable)
    assert all(p.ndim >= 2 for p in decayed["params"])
    names = {trainable[id(p)] for p in decayed["params"]}
    assert not [name for name in names if "embed" in name and "proj" not in name and "decoder" not in name]
    assert not [name for name in names if "token" in name or "bias" in name or "norm" in name]


def test_a_frozen_parameter_is_in_no_group() -> None:
    module = torch.nn.Linear(3, 3)
    module.weight.requires_grad_(False)
    (group,) = parameter_groups(module, 0.1)
    assert group["params"] == [module.bias]


def test_the_rate_respects_each_group_s_scale() -> None:
    optimizer = build_optimizer(torch.nn.Linear(3, 3), OptimizerConfig())
    optimizer.param_groups[0]["lr_scale"] = 0.5
    set_lr(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_pace_looks_at_recent_steps_only() -> None:
    pace = Pace(window=4)
    assert (pace.rate, pace.waiting) == (0.0, 0.0)
    for seconds in [100.0] + [0.5] * 4:
        pace.add(seconds, waited=seconds / 5)
    assert pace.rate == pytest.approx(2.0)
    assert pace.waiting == pytest.approx(0.2)
