"""Laws of growing batches and contexts: pure functions that reach their ends, and lose no sample and no target."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pretrain_kit import recipe

from data.batch import TextBatch
from data.errors import UserError
from pretrain.loop import take_step
from pretrain.setup import prepare
from pretrain.warmup import BatchWarmup, ContextWarmup, cut


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 10**6))
def test_batches_grow_in_multiples_of_the_first_up_to_the_full_size(start: int, times: int, samples: int) -> None:
    warmup, full = BatchWarmup(start=start, samples=samples), start * times
    sizes = [warmup.size(position, full) for position in np.linspace(0, 2 * samples, 50).astype(int).tolist()]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (start, full)
    assert all(size % start == 0 for size in sizes)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 2000), st.floats(1, 5000))
def test_steps_count_batches_until_the_samples_are_used_up(start: int, times: int, samples: int, wanted: float) -> None:
    warmup, full = BatchWarmup(start=start, samples=samples), start * times
    position = 0
    for _ in range(warmup.steps(wanted, full)):
        position += warmup.size(position, full)
    assert abs(position - wanted) <= full


def test_a_context_doubles_in_equal_parts_and_ends_whole() -> None:
    warmup = ContextWarmup(start=32, share=0.6)
    assert [warmup.pieces(x, 256) for x in (0.0, 0.19, 0.2, 0.39, 0.4, 0.59, 0.6, 1.0)] == [8, 8, 4, 4, 2, 2, 1, 1]
    assert [warmup.fits(n) for n in (32, 64, 96, 256, 16)] == [False, True, False, True, False]


def test_cutting_loses_no_target_and_gives_each_piece_a_key() -> None:
    tokens = torch.arange(2 * 17).view(2, 17)
    keys = torch.tensor([5, -7])
    batch = cut(TextBatch(tokens, tokens // 6, keys, torch.tensor([3, 9])), 4)
    assert batch.tokens.shape == batch.documents.shape == (8, 5)
    pairs = {(a, b) for row in batch.tokens.tolist() for a, b in itertools.pairwise(row)}
    assert pairs == {(a, b) for row in tokens.tolist() for a, b in itertools.pairwise(row)}
    assert torch.equal(batch.documents, batch.tokens // 6)
    assert len(set(batch.keys.tolist())) == 8
    assert torch.equal(batch.keys[4:], cut(TextBatch(tokens, tokens, keys, keys)[1:], 4).keys)
    assert batch.ids.tolist() == [3] * 4 + [9] * 4


GROWING: dict[str, Any] = {"train.batch_warmup": {"start": 4, "samples": 40}, "train.microbatch": 2}


@pytest.mark.parametrize("resident", [False, True])
def test_a_growing_batch_reads_every_sample_once_whatever_its_pieces(
    resident: bool, digits: Path, tmp_path: Path
) -> None:
    setup = prepare(recipe("mae", digits / "train", GROWING | {"data.resident": resident}), tmp_path)
    batches, positions, counts = iter(setup.loader), [0], []
    for _ in range(7):
        sums = take_step(setup, batches)
        positions.append(setup.state.position)
        counts.append(sums.count)
    sizes = np.diff(positions).tolist()
    assert sizes == [4, 4, 4, 4, 8, 8, 12]
    assert (np.array(counts) / counts[0]).tolist() == (np.array(sizes) / 4).tolist()


def test_the_gradient_of_a_growing_batch_is_that_of_the_batch_it_is(digits: Path, tmp_path: Path) -> None:
    growing = prepare(recipe("mae", digits / "train", GROWING | {"train.clip": None}), tmp_path)
    plain = prepare(recipe("mae", digits / "train", {"train.batch_size": 4, "train.clip": None}), tmp_path)
    norms = []
    for setup in (growing, plain):
        batches = iter(setup.loader)
        norms.append([take_step(setup, batches).norm for _ in range(3)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("objective", ["next_token", "masked_language"])
def test_rows_are_short_at_first(objective: str, sentences: Path, tmp_path: Path, monkeypatch: Any) -> None:
    settings = {"train.context_warmup": {"start": 8, "share": 0.5}, "train.steps": 8}
    setup = prepare(recipe(objective, sentences, settings), tmp_path)
    seen: list[tuple[int, int]] = []
    forward = type(setup.state.objective).forward

    def watched(self: Any, batch: TextBatch, progress: float) -> Any:
        seen.append((batch.tokens.shape[0], batch.tokens.shape[1] - 1))
        return forward(self, batch, progress)

    monkeypatch.setattr(type(setup.state.objective), "forward", watched)
    batches = iter(setup.loader)
    for _ in range(6):
        assert take_step(setup, batches).finite
    assert seen == [(32, 8), (32, 8), (16, 16), (16, 16), (8, 32), (8, 32)]


@pytest.mark.parametrize(
    ("objective", "settings", "words"),
    [
        ("mae", {"train.batch_warmup": {"start": 5, "samples": 10}}, "multiple of batch_warmup.start"),
        ("mae", {"train.batch_warmup": {"start": 4}}, "'train.batch_warmup.samples' is missing"),
        ("mae", {"train.context_warmup": {"start": 8, "share": 0.5}}, "encoder must be one for text"),
        ("next_token", {"train.context_warmup": {"start": 12, "share": 0.5}}, "by doubling"),
    ],
)
def test_what_does_not_fit_is_refused(objective: str, settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        recipe(objective, tmp_path, settings)
    assert words in str(caught.value)
