"""Law: computing activations again changes no loss and no weight, and is cheaper in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pretrain_kit import write_recipe

from data.errors import UserError
from pretrain.activations import recompute
from pretrain.build import build_objective
from pretrain.cost import count_step
from pretrain.loop import take_step
from pretrain.recipe_file import load_recipe
from pretrain.setup import prepare


@pytest.mark.parametrize("case", ["mae", "dino", "next_token", "masked_language"])
def test_losses_and_weights_are_the_same_bits(case: str, digits: Path, sentences: Path, tmp_path: Path) -> None:
    data = sentences if case in ("next_token", "masked_language") else digits / "train"
    ends = []
    for again in (False, True):
        path = write_recipe(tmp_path / f"{again}.yaml", case, data, {"train.recompute": again, "train.ema": 0.9})
        setup = prepare(load_recipe(path), tmp_path)
        batches = iter(setup.loader)
        losses = [take_step(setup, batches).loss for _ in range(3)]
        ends.append((losses, setup.state.objective.state_dict(), setup.state.encoder().state_dict()))
    assert ends[0][0] == ends[1][0]
    for ours, theirs in zip(ends[0][1:], ends[1][1:], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["mae_cifar10", "next_token_small"])
def test_activations_take_less_memory_for_at_most_a_second_forward_pass(name: str) -> None:
    settings = [] if name == "mae_cifar10" else ["encoder.vocab_size=512"]
    kept, again = (
        count_step(load_recipe(name, [*settings, f"train.recompute={x}"]), 64, 1, "cpu") for x in ("false", "true")
    )
    assert again.activations < 0.6 * kept.activations
    assert 1.1 * kept.flops < again.flops < 1.4 * kept.flops


def test_blocks_with_batch_norm_are_refused() -> None:
    with pytest.raises(UserError, match="BatchNorm"):
        recompute(build_objective(load_recipe("simclr_cifar10")))
