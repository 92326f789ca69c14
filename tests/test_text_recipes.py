"""Law: every text recipe has the size it names, and takes steps, saves and exports at a reduced width."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pretrain_kit import REPOSITORY

from pretrain.build import build_objective
from pretrain.loop import train
from pretrain.recipe_file import load_recipe

SIZES = {
    "next_token_1m": 1.08,
    "next_token_10m": 12.5,
    "gpt2_124m": 124.2,
    "next_token_350m": 355.0,
    "next_token_1b": 1019.0,
    "wiki_books_mlm": 110.7,
    "modernbert_base": 149.7,
}
"""Millions of parameters. Of the published ones GPT-2's is 124, ModernBERT-base's 149."""
TEXT = sorted(
    path.stem for path in (REPOSITORY / "pretrain" / "recipes").glob("*.yaml") if "kind: text" in path.read_text()
)
ENCODER = {"vocab_size": 320, "width": 32, "depth": 4, "heads": 2, "intermediate_size": 32, "context": 32}
TRAIN = {"batch_size": 4, "microbatch": 2, "steps": 2, "compile": "false", "shard": "false"}
SMALL = [
    "data.workers=0",
    "watch.evaluate_every=0",
    *(f"encoder.{key}={value}" for key, value in ENCODER.items()),
    *(f"train.{key}={value}" for key, value in TRAIN.items()),
]


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_as_named(name: str) -> None:
    with torch.device("meta"):
        objective = build_objective(load_recipe(name))
    assert sum(p.numel() for p in objective.parameters()) / 1e6 == pytest.approx(SIZES[name], abs=0.06)


@pytest.mark.parametrize("name", TEXT)
def test_two_steps_at_a_reduced_width(name: str, sentences: Path, tmp_path: Path) -> None:
    small = [f"data.train={sentences}", *SMALL]
    if load_recipe(name).train.context_warmup is not None:
        small.append("train.context_warmup={start: 8, share: 0.5}")
    export = train(load_recipe(name, small), tmp_path / "run")
    assert json.loads((export / "headwater" / "export.json").read_text())["step"] == 2
