"""Texts that share rows get the vectors that they get alone, and the same gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_finetune_kit import write_text_encoder

from finetune.encoder import load_encoder
from finetune.packing import pack
from finetune.stochastic_depth import StochasticDepth
from finetune.text_encoder import DocumentEncoder

LENGTHS = (20, 3, 7, 12, 2, 18, 5, 9, 20, 4)


def _rows(encoder: DocumentEncoder, lengths: tuple[int, ...]) -> list[np.ndarray]:
    draw = np.random.Generator(np.random.Philox(1))
    most = encoder.tokenizer.get_vocab_size()
    return [draw.integers(5, most, length).astype(np.int64) for length in lengths]


def _pooled(encoder: DocumentEncoder, rows: list[np.ndarray]) -> torch.Tensor:
    ids = torch.arange(len(rows))
    return encoder(encoder.batch(rows, ids, ids))


def _encoder(folder: Path, causal: bool, pooling: str = "mean") -> DocumentEncoder:
    encoder = load_encoder(write_text_encoder(folder, causal=causal), "last" if pooling == "last" else "mean")
    assert isinstance(encoder, DocumentEncoder)
    return encoder.requires_grad_(True)


def test_every_token_has_its_place_and_no_text_a_neighbour_of_its_number() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 99, (len(LENGTHS), 24), generator=generator)
    real = torch.arange(24) < torch.tensor(LENGTHS)[:, None]
    packed = pack(tokens, (~real).long(), pad=0)
    assert packed is not None
    assert len(packed.tokens) == 5  # 100 tokens; no two of 20, 20 and 18 fit into 24
    assert torch.equal(packed.unpack(packed.tokens[..., None])[..., 0][real], tokens[real])
    numbers, counts = packed.documents.unique(return_counts=True)
    assert numbers.tolist() == list(range(len(LENGTHS) + 1))
    assert tuple(counts[:-1].tolist()) == LENGTHS
    assert packed.tokens[packed.documents == len(LENGTHS)].eq(0).all()


def test_rows_that_are_full_stay_as_they_are() -> None:
    tokens = torch.ones(4, 8, dtype=torch.int64)
    assert pack(tokens, torch.zeros_like(tokens), pad=0) is None
    more = (torch.arange(8) >= torch.tensor([5, 6, 7, 8])[:, None]).long()  # nothing fits beside five of eight
    assert pack(tokens, more, pad=0) is None


def test_texts_of_few_lengths_are_joined_without_padding() -> None:
    lengths = torch.tensor([5, 3, 5, 3, 5, 5])
    real = torch.arange(8) < lengths[:, None]
    tokens = torch.arange(48).view(6, 8)
    packed = pack(tokens, (~real).long(), pad=0)
    assert packed is not None
    assert packed.tokens.shape == (1, 26)
    assert packed.documents.tolist() == [[1] * 3 + [3] * 3 + [0] * 5 + [2] * 5 + [4] * 5 + [5] * 5]
    assert torch.equal(packed.unpack(packed.tokens[..., None])[..., 0][real], tokens[real])


@pytest.mark.parametrize("lengths", [LENGTHS, (20, 9, 20, 9, 20, 9, 20, 9, 9)])
@pytest.mark.parametrize(("causal", "pooling"), [(False, "mean"), (True, "mean"), (True, "last")])
def test_texts_in_shared_rows_get_the_features_and_the_gradient_that_they_get_alone(
    tmp_path: Path, causal: bool, pooling: str, lengths: tuple[int, ...]
) -> None:
    encoder, seen = _encoder(tmp_path / "export", causal, pooling), []
    rows = _rows(encoder, lengths)
    weights = torch.randn(len(rows), encoder.features, generator=torch.Generator().manual_seed(1))
    encoder.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    together = _pooled(encoder, rows)
    assert seen[0] < len(rows)
    (together * weights).sum().backward()
    shared = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
    alone = torch.cat([_pooled(encoder, [row]) for row in rows])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=1e-4)
    encoder.zero_grad()
    (alone * weights).sum().backward()
    for name, parameter in encoder.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(shared[name], parameter.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_stochastic_depth_keeps_one_text_a_row(tmp_path: Path) -> None:
    encoder, seen = _encoder(tmp_path / "export", causal=False), []
    rows = _rows(encoder, LENGTHS)
    encoder.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    depth = StochasticDepth(encoder, 0.5)
    depth.draw(torch.arange(len(rows)))
    _pooled(encoder.train(), rows)
    depth.remove()
    _pooled(encoder, rows)
    assert seen[0] == len(rows) > seen[1]
