"""Laws of replaced-token detection: what is sampled, what is judged, where gradients go, sums over microbatches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pretrain_kit import recipe
from test_masked_language import CONFIG, rows
from torch.nn import functional as F
from torch.testing import assert_close

from pretrain.encoders.text import TextEncoder
from pretrain.export import check
from pretrain.loop import train
from pretrain.objectives.masking import places_of
from pretrain.objectives.replaced_token import ReplacedToken, ReplacedTokenConfig
from pretrain.objectives.vocabulary import sample_tokens
from pretrain.run import read_metrics


def build(**settings: object) -> ReplacedToken:
    torch.manual_seed(0)
    return ReplacedToken(TextEncoder(CONFIG), ReplacedTokenConfig.model_validate(settings))


def test_tokens_are_drawn_with_the_softmax_s_probabilities() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, -30.0])
    lots = torch.arange(10_000) / 10_000
    drawn = sample_tokens(torch.ones(10_000, 1), logits[:, None], torch.zeros(5), lots, chunk=999)
    assert_close(drawn.bincount(minlength=5) / 10_000, logits.softmax(0), atol=2e-4, rtol=0.0)


def test_only_hidden_places_are_filled_and_all_ordinary_tokens_are_judged() -> None:
    objective, batch = build(), rows(16, 41)
    seen, chosen = objective.generator.masked(batch, 0.0)
    hidden, _, _ = objective.generator.hidden_targets(seen, chosen, batch)
    filled = objective._filled(seen, chosen, hidden, batch.keys)
    tokens = batch.tokens[:, :-1]
    assert torch.equal(filled[~chosen], tokens[~chosen])
    assert (filled[chosen] != tokens[chosen]).float().mean() > 0.9, "an untrained generator is seldom right"
    places = places_of(chosen, objective.config.generator.capacity(40))
    assert torch.equal(torch.zeros_like(chosen).scatter(1, places, chosen.gather(1, places)), chosen)

    output = objective(batch, 0.0)
    judged = ~objective.table.special[tokens]
    scores = objective.detector(objective.encoder(filled, batch.documents[:, :-1], causal=False))
    wrong = F.binary_cross_entropy_with_logits(scores, (filled != tokens).float(), reduction="none")[judged].sum()
    alone = objective.generator(batch, 0.0)
    assert_close(output.loss_sum, alone.loss_sum + 50 * 0.15 * wrong)
    assert_close(output.target_count, alone.target_count)


def test_rows_draw_alone() -> None:
    objective, batch = build(), rows(12, 61)
    whole = objective(batch, 0.5)
    parts = [objective(batch[s], 0.5) for s in (slice(0, 1), slice(1, 7), slice(7, 12))]
    assert_close(whole.loss_sum, torch.stack([part.loss_sum for part in parts]).sum())
    for name, value in whole.metrics.items():
        assert_close(value, torch.stack([part.metrics[name] for part in parts]).sum())


def test_the_detector_s_gradient_reaches_the_generator_by_the_shared_embedding_alone() -> None:
    objective, batch = build(weight=1e6), rows(4, 41)
    alone = build(weight=1e-30)
    for each in (objective, alone):
        each(batch, 0.0).loss_sum.backward()
    for name, parameter in objective.named_parameters():
        other = alone.get_parameter(name).grad
        assert parameter.grad is not None, name
        assert other is not None, name
        if name.startswith("generator"):
            assert_close(parameter.grad, other)
        else:
            assert parameter.grad.abs().max() > 10 * other.abs().max(), name


def test_weights_are_saved_once_and_load() -> None:
    objective = build()
    tensors = [tensor.data_ptr() for name, tensor in objective.state_dict().items() if "weight" in name]
    assert len(tensors) == len(set(tensors))
    again = build(generator_depth=1)
    again.load_state_dict(objective.state_dict())
    assert again.generator.encoder.embeddings is again.encoder.embeddings
    with pytest.raises(RuntimeError, match="generator_layers"):
        build(generator_depth=2).load_state_dict(objective.state_dict())


def test_it_learns_and_loads_in_transformers(sentences: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    chosen = recipe("replaced_token", sentences, {"train.steps": 360, "train.batch_size": 16, "optimizer.lr": 1e-2})
    export = train(chosen, tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "detected" in line]
    # What always saying "original" would be right about.
    trivial = sum(1 - line["replaced"] for line in lines[-20:])
    assert sum(line["detected"] for line in lines[-20:]) > trivial + 0.01 * 20
    assert lines[-1]["accuracy"] > 0.3 > lines[0]["accuracy"]
    check(export)
    model, report = transformers.AutoModel.from_pretrained(export, output_loading_info=True)
    assert type(model).__name__ == "ModernBertModel"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
