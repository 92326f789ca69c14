"""Laws of a sharded start: the weights are those of a plain one, and no process but the first ever holds them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_kit import BASES, TEXTS, two_workers, write_recipe

EXTRA: dict[str, dict[str, Any]] = {
    "mae": {"train.ema": 0.9, "train.recompute": True},
    "next_token": {"train.ema": 0.9, "train.recompute": True, "objective.fill_in_middle": 0.5},
}
LARGE = {"encoder.width": 512, "encoder.depth": 20, "encoder.heads": 8, "encoder.intermediate_size": 1376}


def observed(cases: list[str], digits: Path, sentences: Path, folder: Path) -> dict[str, list[dict[str, Any]]]:
    data = {case: sentences if case in TEXTS else digits / "train" for case in cases}
    paths = [write_recipe(folder / f"{case}.yaml", case, data[case], EXTRA.get(case, {})) for case in cases]
    first, second = two_workers("materialise_worker.py", folder, "observe", *paths, timeout=900)
    return {case: [first[place], second[place]] for place, case in enumerate(cases)}


def check(found: dict[str, list[dict[str, Any]]]) -> None:
    for case, each in found.items():
        for seen in each:
            sharded, plain = seen["sharded start"], seen["plain start"]
            assert sharded.keys() == plain.keys(), case
            for name, tensor in plain.items():
                assert torch.equal(sharded[name], tensor), (case, name)
            for ours, theirs in zip(seen["sharded losses"], seen["plain losses"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4), case


def test_a_sharded_start_has_the_bits_of_a_plain_one(digits: Path, sentences: Path, tmp_path: Path) -> None:
    check(observed(["mae", "next_token", "masked_language"], digits, sentences, tmp_path))


@pytest.mark.slow
def test_so_has_every_objective_s(digits: Path, sentences: Path, tmp_path: Path) -> None:
    check(observed(list(BASES), digits, sentences, tmp_path))


@pytest.mark.slow
def test_only_the_first_process_ever_holds_the_model(sentences: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "large.yaml", "next_token", sentences, LARGE)
    whole = 4 * 20 * 512 * (4 * 512 + 3 * 1376)  # bytes of the layers' matrices
    (first,), (second,) = two_workers("materialise_worker.py", tmp_path, "measure", path)
    assert first["state"]
    assert first["same"]
    assert not second["state"]
    # The first draws all and keeps half; the second keeps half, and a tensor or two in passing.
    assert first["start"] > whole
    assert second["start"] < 0.75 * whole
    assert second["export"] < 0.1 * whole
    # The first gathers one model on the host, not two.
    assert first["export"] < 1.5 * whole
