"""Laws of next-token prediction: which targets count, exact chunking, sums over microbatches, learning."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pretrain_kit import recipe
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from data.batch import TextBatch
from data.tokenizer import train
from pretrain.encoders.text import TextConfig, TextEncoder
from pretrain.generate import generate
from pretrain.loop import train as run
from pretrain.objectives.next_token import NextToken, NextTokenConfig
from pretrain.objectives.vocabulary import token_loss, token_nats
from pretrain.text_metrics import KneserNeyBigram, bits_per_byte

PAD, BOS, EOS = 0, 1, 2
CONFIG = TextConfig(vocab_size=60, width=32, depth=2, heads=2, intermediate_size=48, context=24)


def build(config: TextConfig = CONFIG, **settings: float) -> NextToken:
    torch.manual_seed(0)
    return NextToken(TextEncoder(config), NextTokenConfig.model_validate(settings))


def rows(b: int, n: int, seed: int = 0) -> TextBatch:
    """Random rows with documents of random length, the last row padded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 60, (b, n), generator=generator)
    starts = torch.rand((b, n), generator=generator) < 0.15
    tokens[starts] = BOS
    tokens[:, :-1][starts[:, 1:]] = EOS
    tokens[-1, n - 4 :] = PAD
    keys = torch.arange(b)
    return TextBatch(tokens, (tokens == BOS).cumsum(1), keys, keys)


def gradients(objective: NextToken, loss: Tensor) -> list[Tensor]:
    objective.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in objective.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk", [1, 7, 40, 100])
def test_chunked_loss_is_the_plain_loss(chunk: int, z_loss: float) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((40, 8), (30, 8), (30,)))
    leaves = [tensor.float().requires_grad_() for tensor in (hidden, weight, bias)]
    plain = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    targets, counted = torch.randint(30, (40,)), torch.rand(40) < 0.7
    logits = F.linear(*plain)
    expected = F.cross_entropy(logits, targets, reduction="none") + z_loss * logits.logsumexp(1).square()
    sums = token_loss(leaves[0], leaves[1], leaves[2], targets, counted, chunk=chunk, z_loss=z_loss)
    (3 * sums.loss).backward()
    (3 * expected[counted].sum()).backward()
    assert_close(sums.loss.double(), expected[counted].sum())
    assert int(sums.correct) == int((logits.argmax(1) == targets)[counted].sum())
    assert_close(sums.z_loss.double(), z_loss * logits.logsumexp(1).square()[counted].sum(), rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(leaves, plain, strict=True):
        assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]
    plain_nats = token_nats(leaves[0], leaves[1], leaves[2], targets, chunk)
    assert_close(plain_nats.double(), F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-5)
    assert not sums.correct.requires_grad
    assert not sums.z_loss.requires_grad


def test_chunks_do_not_change_the_objective() -> None:
    batch = rows(6, 25)
    whole, pieces = build(chunk=10_000), build(chunk=11)
    losses = [objective(batch, 0.0).loss_sum for objective in (whole, pieces)]
    assert_close(losses[0], losses[1])
    for a, b in zip(gradients(whole, losses[0]), gradients(pieces, losses[1]), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_stays_near_float32() -> None:
    objective, batch = build(), rows(6, 25)
    exact = objective(batch, 0.0).loss_sum
    grads = gradients(objective, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = objective(batch, 0.0).loss_sum
    assert rough.dtype == torch.float32
    assert_close(rough, exact, rtol=0.01, atol=0)
    for a, b in zip(gradients(objective, rough), grads, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.05


def test_boundaries_and_padding_are_no_targets() -> None:
    tokens = torch.tensor([[9, 8, EOS, BOS, 7, EOS, BOS, 6], [BOS, 5, 4, EOS, PAD, PAD, PAD, PAD]])
    keys = torch.arange(2)
    batch = TextBatch(tokens, (tokens == BOS).cumsum(1), keys, keys)
    objective = build()
    output = objective(batch, 0.0)
    counted = [[1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0, 0]]
    nats, mask = objective.nats(batch)
    assert mask.long().tolist() == counted
    assert output.target_count == 8
    assert_close(output.loss_sum, nats[mask].sum())
    logits = objective.logits(batch.tokens[:, :-1], batch.documents[:, :-1])
    assert_close(nats, F.cross_entropy(logits.mT, tokens[:, 1:], reduction="none"))


def test_a_document_counts_the_same_wherever_it_is_packed() -> None:
    objective = build()
    documents = [torch.cat([torch.tensor([BOS]), torch.randint(3, 60, (n,)), torch.tensor([EOS])]) for n in (3, 9, 6)]

    def loss(parts: list[Tensor]) -> Tensor:
        tokens = torch.cat(parts)[None]
        key = torch.zeros(1, dtype=torch.long)
        return objective(TextBatch(tokens, (tokens == BOS).cumsum(1), key, key), 0.0).loss_sum

    assert_close(loss(documents), sum(loss([part]) for part in documents))
    assert_close(loss(documents), loss(documents[::-1]))


def test_without_document_mask_earlier_documents_are_context() -> None:
    batch = rows(4, 25)
    masked, open_ = build(), build(document_mask=False)
    assert masked(batch, 0.0).target_count == open_(batch, 0.0).target_count
    one = torch.zeros_like(batch.documents)
    logits = open_.logits(batch.tokens, batch.documents)
    assert_close(logits, masked.logits(batch.tokens, one))
    assert (logits - masked.logits(batch.tokens, batch.documents)).abs().max() > 1e-3


def test_microbatches_sum_to_the_joined_batch() -> None:
    objective, batch = build(), rows(6, 25)
    whole = objective(batch, 0.0)
    parts = [objective(batch[s], 0.0) for s in (slice(0, 1), slice(1, 4), slice(4, 6))]
    for name in ("loss_sum", "target_count"):
        assert_close(getattr(whole, name), sum(getattr(part, name) for part in parts))
    assert_close(whole.metrics["accuracy"], sum(part.metrics["accuracy"] for part in parts))
    joined = gradients(objective, whole.loss_sum / whole.target_count)
    objective.zero_grad()
    for part in parts:
        (part.loss_sum / whole.target_count).backward()
    for parameter, expected in zip(objective.parameters(), joined, strict=True):
        assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_state_is_the_checkpoint_and_builds_on_meta() -> None:
    objective = build()
    with torch.device("meta"):
        empty = NextToken(TextEncoder(CONFIG), NextTokenConfig())
    empty.to_empty(device="cpu").load_state_dict(objective.state_dict())
    batch = rows(3, 25)
    assert torch.equal(empty(batch, 0.0).loss_sum, objective(batch, 0.0).loss_sum)
    assert objective.exported() is objective.encoder


def cycle(length: int = 24, b: int = 8) -> TextBatch:
    """Rows that count upwards modulo 40 from random starts: a bigram knows them, a unigram does not."""
    start = torch.randint(0, 40, (b, 1), generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([torch.full((b, 1), BOS), 10 + (start + torch.arange(length)) % 40], dim=1)
    keys = torch.arange(b)
    return TextBatch(tokens, torch.ones_like(tokens), keys, keys)


def test_it_learns() -> None:
    objective, batch = build(), cycle()
    optimiser = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    first = objective(batch, 0.0)
    for _ in range(40):
        output = objective(batch, 0.0)
        (output.loss_sum / output.target_count).backward()
        optimiser.step()
        optimiser.zero_grad()
    last = objective(batch, 1.0)
    assert first.loss_sum / first.target_count > 3.5
    assert last.loss_sum / last.target_count < 1.5
    assert last.metrics["accuracy"] / last.target_count > 0.8


def test_bits_per_byte_counts_bytes_of_text_targets_only() -> None:
    objective, batch = build(), rows(5, 25)
    sizes = np.random.default_rng(0).integers(1, 6, 60)
    sizes[:7] = 0
    nats, counted = objective.nats(batch)
    size = torch.as_tensor(sizes)[batch.tokens[:, 1:]]
    text = counted & (size > 0)
    expected = float(nats[text].sum()) / math.log(2) / float(size[text].sum())
    parts = [batch[:2], batch[2:]]
    assert bits_per_byte(objective, parts, sizes) == pytest.approx(expected, rel=1e-6)


def test_kneser_ney_is_a_distribution_and_beats_chance() -> None:
    random = np.random.default_rng(0)
    rows_ = [random.zipf(1.5, (3, 200)).clip(max=40) + 2 for _ in range(3)]
    for row in rows_:
        row[:, ::50] = BOS
    model = KneserNeyBigram(60).fit(rows_, BOS)
    contexts = np.repeat(np.arange(60), 60)
    table = model.probability(contexts, np.tile(np.arange(60), 60)).reshape(60, 60)
    assert (table > 0).all()
    np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-9)
    sizes = np.where(np.arange(60) > 2, 1, 0)
    assert model.bits_per_byte(rows_, sizes) < math.log2(57)
    cycle_rows = cycle().tokens.numpy()
    assert KneserNeyBigram(60).fit([cycle_rows], BOS).bits_per_byte([cycle_rows], sizes) < 1.0


def test_generation_repeats_itself_and_follows_the_seed() -> None:
    tokenizer = train(["the quick brown fox jumps over the lazy dog"] * 3, 280)
    config = CONFIG.model_copy(update={"vocab_size": tokenizer.get_vocab_size() + 5})
    objective = build(config)
    texts = [generate(objective, tokenizer, "the <|eos|>", 40, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("the <|eos|>")
    greedy = {generate(objective, tokenizer, "fox", 10, temperature=0, seed=seed) for seed in range(3)}
    assert len(greedy) == 1


def test_texts_are_written_while_it_trains(sentences: Path, tmp_path: Path) -> None:
    settings = {"train.steps": 4, "watch.evaluate_every": 2, "watch.prompts": ["4 bottles"], "watch.sample_tokens": 5}
    for name in ("with", "without"):
        run(
            recipe("next_token", sentences, settings if name == "with" else settings | {"watch.prompts": []}),
            tmp_path / name,
        )
    samples = [json.loads(line) for line in (tmp_path / "with" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 4]
    assert all(sample["text"].startswith("4 bottles") for sample in samples)
    weights = [(tmp_path / name / "export" / "model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] == weights[1], "looking changes nothing"
