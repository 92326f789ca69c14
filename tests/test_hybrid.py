"""Laws of mixing both objectives: one encoder, a turn for each batch, weights target by target."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from test_masked_language import CONFIG, rows
from torch.testing import assert_close

from pretrain.encoders.text import TextEncoder
from pretrain.objectives.hybrid import Hybrid, HybridConfig, is_causal
from pretrain.objectives.next_token import NextToken, NextTokenConfig


def build(**settings: object) -> Hybrid:
    torch.manual_seed(0)
    return Hybrid(TextEncoder(CONFIG), HybridConfig.model_validate(settings))


def test_turns_come_in_their_share() -> None:
    turns = [is_causal((step + 0.5) / 2000, 0.3) for step in range(2000)]
    assert sum(turns) / 2000 == pytest.approx(0.3, abs=0.035)
    runs = sum(a != b for a, b in pairwise(turns))
    assert runs == pytest.approx(2 * 0.3 * 0.7 * 2000, rel=0.12), "no streaks"


def test_a_batch_is_one_or_the_other() -> None:
    objective, batch = build(), rows(4, 41)
    for step in range(6):
        progress = (step + 0.5) / 6
        part = objective.causal_part if is_causal(progress, 0.5) else objective.masked_part
        assert objective(batch, progress).loss_sum == part(batch, progress).loss_sum
    assert len({is_causal((step + 0.5) / 6, 0.5) for step in range(6)}) == 2


def test_sums_are_weighted_target_by_target() -> None:
    objective, batch = build(combine="sum", causal_share=0.25), rows(4, 41)
    output, masked, causal = (part(batch, 0.3) for part in (objective, objective.masked_part, objective.causal_part))
    assert_close(output.loss_sum, 0.75 * masked.loss_sum + 0.25 * causal.loss_sum)
    assert_close(output.target_count, 0.75 * masked.target_count + 0.25 * causal.target_count)
    parts = [objective(batch[s], 0.3) for s in (slice(0, 1), slice(1, 4))]
    assert_close(output.loss_sum, parts[0].loss_sum + parts[1].loss_sum)
    assert_close(output.target_count, parts[0].target_count + parts[1].target_count)


def test_both_parts_share_every_weight() -> None:
    objective = build()
    names = {name for name, _ in objective.named_parameters()}
    assert all(name.startswith(("encoder.", "head.")) for name in names)
    tensors = [tensor.data_ptr() for name, tensor in objective.state_dict().items() if "weight" in name]
    assert len(tensors) == len(set(tensors)), "each weight is saved once"
    again = build(causal_share=0.9)
    again.load_state_dict(objective.state_dict())


def test_documents_are_rearranged_in_training_only() -> None:
    torch.manual_seed(0)
    objective = NextToken(TextEncoder(CONFIG), NextTokenConfig(fill_in_middle=1.0))
    assert objective.middle is not None
    objective.middle.bos.fill_(1)
    objective.middle.eos.fill_(2)
    objective.middle.marks.copy_(torch.tensor([4, 5, 6]))
    plain = NextToken(objective.encoder, NextTokenConfig(), objective.head)
    batch = rows(4, 41)
    assert objective.train()(batch, 0.5).loss_sum != plain(batch, 0.5).loss_sum
    assert objective.eval()(batch, 0.5).loss_sum == plain(batch, 0.5).loss_sum
