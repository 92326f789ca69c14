"""Laws of masked language modelling: what is masked, how it is hidden, sums over microbatches, learning."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from data.batch import TextBatch
from data.keyed import sample_keys
from data.tokenizer import train
from data.vocabulary import Vocabulary
from pretrain.encoders.text import TextConfig, TextEncoder
from pretrain.objectives.masked_language import MaskedLanguage, MaskedLanguageConfig
from pretrain.objectives.masking import words

PAD, BOS, EOS, MASK = 0, 1, 2, 3
CONFIG = TextConfig(vocab_size=60, width=32, depth=2, heads=2, intermediate_size=48, context=40)


def build(config: TextConfig = CONFIG, **settings: object) -> MaskedLanguage:
    torch.manual_seed(0)
    return MaskedLanguage(TextEncoder(config), MaskedLanguageConfig.model_validate(settings))


def rows(b: int, n: int, seed: int = 0) -> TextBatch:
    """Random rows with documents of random length, the last row padded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(7, 60, (b, n), generator=generator)
    starts = torch.rand((b, n), generator=generator) < 0.1
    tokens[starts] = BOS
    tokens[:, :-1][starts[:, 1:]] = EOS
    tokens[-1, n - 4 :] = PAD
    ids = np.arange(b)
    return TextBatch(tokens, (tokens == BOS).cumsum(1), torch.from_numpy(sample_keys(seed, 0, ids)), torch.arange(b))


def join(objective: MaskedLanguage, goes_on: Tensor) -> None:
    """Let the ids where `goes_on` (60,) is True go on with the word before them."""
    objective.table.goes_on.copy_(goes_on & ~objective.table.special)
    objective.table.open_end.copy_(~objective.table.special)


def groups_of(objective: MaskedLanguage, batch: TextBatch) -> Tensor:
    return words(batch.tokens[:, :-1], batch.documents[:, :-1], objective.table)


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.75])
def test_exactly_the_share_of_ordinary_tokens_is_masked(ratio: float) -> None:
    batch = rows(16, 101)
    seen, chosen = build(mask_ratio=ratio).masked(batch, 0.0)
    tokens = batch.tokens[:, :-1]
    ordinary = tokens > 6
    assert not (chosen & ~ordinary).any()
    wanted = ordinary.sum(1) * ratio
    assert ((chosen.sum(1) - wanted).abs() < 1).all()
    assert abs(float((chosen.sum(1) - wanted).mean())) < 0.3, "rounded up as often as down"
    assert (seen[chosen] == MASK).all()
    assert torch.equal(seen[~chosen], tokens[~chosen])


@pytest.mark.parametrize("unit", ["token", "word", "span"])
def test_every_place_is_masked_equally_often(unit: str) -> None:
    tokens = torch.randint(7, 60, (4000, 41))
    keys = torch.from_numpy(sample_keys(1, 0, np.arange(4000)))
    batch = TextBatch(tokens, torch.zeros_like(tokens), keys, keys)
    objective = build(unit=unit)
    join(objective, torch.arange(60) % 3 == 0)
    chosen = objective.masked(batch, 0.0)[1].float()
    assert chosen.mean() > (0.29 if unit == "token" else 0.25)
    rate = chosen.mean(0)
    # Six standard errors of a share near 0.3 over 4,000 rows; groups at the ends are shorter on average.
    spread = 6 * (0.21 / 4000) ** 0.5
    assert ((rate - rate.mean()).abs() < (spread if unit == "token" else 0.06)).all()


def test_masks_are_the_rows_own() -> None:
    batch = rows(12, 61)
    for settings in ({"unit": "token"}, {"unit": "word"}, {"unit": "span", "masked": 0.8, "replaced": 0.1}):
        objective = build(**settings)
        join(objective, torch.arange(60) % 2 == 1)
        seen, chosen = objective.masked(batch, 0.5)
        parts = [objective.masked(batch[s], 0.5) for s in (slice(0, 1), slice(1, 7), slice(7, 12))]
        assert torch.equal(seen, torch.cat([part[0] for part in parts]))
        assert torch.equal(chosen, torch.cat([part[1] for part in parts]))
    again = rows(12, 61)
    again.keys = torch.from_numpy(sample_keys(0, 1, np.arange(12)))
    assert not torch.equal(build().masked(again, 0.5)[1], build().masked(batch, 0.5)[1]), "epochs must differ"


def test_a_corruption_split_hides_replaces_and_keeps() -> None:
    tokens = torch.randint(7, 60, (400, 101))
    keys = torch.from_numpy(sample_keys(0, 0, np.arange(400)))
    batch = TextBatch(tokens, torch.zeros_like(tokens), keys, keys)
    seen, chosen = build(masked=0.8, replaced=0.1).masked(batch, 0.0)
    truth, shown = tokens[:, :-1][chosen], seen[chosen]
    hidden, kept = shown == MASK, shown == truth
    swapped = ~hidden & ~kept
    for share, wanted in ((hidden, 0.8), (kept, 0.1 + 0.1 / 53), (swapped, 0.1 * 52 / 53)):
        assert share.float().mean().item() == pytest.approx(wanted, abs=0.012)
    drawn = shown[swapped]
    assert drawn.min() > 6, "special tokens are no replacements"
    assert len(drawn.unique()) == 53, "replacements come from the whole vocabulary"


def test_whole_words_and_spans_are_masked_whole() -> None:
    batch = rows(32, 81)
    objective = build(unit="word")
    join(objective, torch.arange(60) % 3 == 0)
    chosen, groups = objective.masked(batch, 0.0)[1], groups_of(objective, batch)
    maskable = ~objective.table.special[batch.tokens[:, :-1]]
    longest = 0
    for row in range(32):
        for group in groups[row].unique():
            own = (groups[row] == group) & maskable[row]
            assert chosen[row][own].all() or not chosen[row][own].any()
            longest = max(longest, int(own.sum()))
    assert longest > 2
    assert chosen.sum() / maskable.sum() > 0.25


def test_spans_have_the_mean_length() -> None:
    from pretrain.objectives.masking import spans

    keys = torch.from_numpy(sample_keys(0, 0, np.arange(500)))
    groups = spans(keys, torch.zeros(500, 200, dtype=torch.long), 4.0)
    lengths = torch.cat([row.bincount()[1:-1] for row in groups])
    assert lengths.float().mean().item() == pytest.approx(4.0, rel=0.05)
    assert (lengths == 1).float().mean().item() == pytest.approx(0.25, abs=0.02), "geometric"


def test_the_ratio_follows_progress() -> None:
    objective, batch = build(mask_ratio=0.4, final_mask_ratio=0.1), rows(8, 81)
    shares = [objective(batch, progress).target_count.item() for progress in (0.0, 0.5, 1.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] / shares[2] == pytest.approx(4, rel=0.1)


def test_the_loss_is_plain_cross_entropy_over_the_chosen() -> None:
    objective, batch = build(chunk=7), rows(6, 41)
    seen, chosen = objective.masked(batch, 0.3)
    output = objective(batch, 0.3)
    logits = objective.logits(seen, batch.documents[:, :-1])
    expected = F.cross_entropy(logits[chosen], batch.tokens[:, :-1][chosen], reduction="sum")
    assert_close(output.loss_sum, expected)
    assert output.target_count == chosen.sum()
    nats, targets, counted = objective.nats(batch, 0.3)
    assert_close(nats[counted].sum(), expected)
    assert torch.equal(targets[counted], batch.tokens[:, :-1][chosen])
    assert_close(output.metrics["accuracy"], (logits.argmax(-1) == batch.tokens[:, :-1])[chosen].sum().float())


def test_microbatches_sum_to_the_joined_batch() -> None:
    objective, batch = build(unit="span", masked=0.8, replaced=0.1), rows(6, 41)
    whole = objective(batch, 0.2)
    (whole.loss_sum / whole.target_count).backward()
    joined = [parameter.grad.clone() for parameter in objective.parameters()]
    objective.zero_grad()
    count = torch.zeros(())
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        output = objective(batch[part], 0.2)
        count += output.target_count
        (output.loss_sum / whole.target_count).backward()
    assert count == whole.target_count
    for parameter, expected in zip(objective.parameters(), joined, strict=True):
        assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_both_sides_are_seen_and_hidden_tokens_are_not() -> None:
    objective, batch = build(), rows(2, 41)
    seen, chosen = objective.masked(batch, 0.0)
    other = batch.tokens.clone()
    other[:, :-1][chosen] = 7
    assert torch.equal(objective.masked(TextBatch(other, *list(vars(batch).values())[1:]), 0.0)[0], seen)
    before = objective.logits(seen)
    seen[:, 30] = 9
    assert (objective.logits(seen)[:, :30] - before[:, :30]).abs().max() > 1e-6


def test_it_learns_a_cycle() -> None:
    """Token i follows token i - 1: hidden ones are told by their neighbours on either side."""
    objective = build(mask_ratio=0.15)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)

    def batches() -> Iterator[TextBatch]:
        for step in range(160):
            start = torch.randint(0, 53, (16, 1), generator=torch.Generator().manual_seed(step))
            tokens = 7 + (start + torch.arange(41)) % 53
            keys = torch.from_numpy(sample_keys(step, 0, np.arange(16)))
            yield TextBatch(tokens, torch.zeros_like(tokens), keys, keys)

    first = last = 0.0
    for batch in batches():
        output = objective(batch, 0.0)
        last = (output.loss_sum / output.target_count).item()
        first = first or last
        optimizer.zero_grad()
        (output.loss_sum / output.target_count).backward()
        optimizer.step()
    assert first > 3.5
    assert last < 1.5


def test_words_begin_where_the_tokenizer_says() -> None:
    text = "The unbelievable 東京 re-electrification, of café's 12345\n\tlamps"
    tokenizer = train(["The cafe of lamps unbelievable " * 3, "electrification"], 300)
    vocabulary = Vocabulary.of(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces: list[list[int]] = []
    for index in ids:
        if not pieces or not (vocabulary.goes_on[index] and vocabulary.open_end[pieces[-1][-1]]):
            pieces.append([])
        pieces[-1].append(index)
    found = [tokenizer.decode(piece) for piece in pieces]
    words_ = ["The", " unbelievable", " 東京", " re", "-", "electrification", ",", " of", " café", "'", "s"]
    assert found == [*words_, " 12345", "\n", "\t", "lamps"]
    assert vocabulary.special.nonzero()[0].tolist() == list(range(7))
    assert vocabulary.mask == MASK


def test_shares_of_more_than_everything_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to more than 1"):
        MaskedLanguageConfig(masked=0.8, replaced=0.3)
