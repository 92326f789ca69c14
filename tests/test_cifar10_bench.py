"""The CIFAR-10 table: its rows are recipes, its probe finds what is linear, and calls add up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pretrain_kit import REPOSITORY, run

from pretrain.recipe_file import load_recipe

BENCH = REPOSITORY / "tests" / "bench"
sys.path.insert(0, str(BENCH))
import cifar10  # noqa: E402
from cifar10_probes import linear_accuracy  # noqa: E402


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise of different brightness, in folders as CIFAR-10's."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for side in ("train", "test"):
        for label, brightness in {"dark": 60, "light": 180}.items():
            (folder / side / label).mkdir(parents=True)
            for number in range(40):
                pixels = np.clip(draw.normal(brightness, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / side / label / f"{number}.png")
    return folder


def test_every_row_that_is_not_missing_is_a_recipe_of_resnet18_or_says_vit(tmp_path: Path) -> None:
    arguments = cifar10._arguments([str(tmp_path), str(tmp_path), "--epochs", "200"])
    for name, row in cifar10.ROWS.items():
        if row.recipe is None:
            continue
        settings = [word for word in cifar10.overrides(name, 3, arguments) if "max_time" not in word]
        recipe = load_recipe(row.recipe, settings)
        assert (recipe.seed, recipe.train.epochs, recipe.data.validation) == (3, 200, None)
        assert recipe.encoder.kind == "vision"
        assert recipe.encoder.model == ("resnet18_cifar" if name != "mae_vit" else "vit_tiny_patch16_224")


def test_the_probe_finds_a_linear_rule_and_no_more() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(1500, 16, generator=draw) * torch.logspace(-2, 2, 16)
    labels = (inputs / torch.logspace(-2, 2, 16))[:, :4].argmax(1)
    assert linear_accuracy(inputs[:1000], labels[:1000], inputs[1000:], labels[1000:]) > 0.93
    shuffled = labels[torch.randperm(1500, generator=draw)]
    assert linear_accuracy(inputs[:1000], shuffled[:1000], inputs[1000:], shuffled[1000:]) < 0.4


def test_the_table_averages_seeds_and_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for seed, knn in {0: 0.8, 1: 0.82}.items():
        result = cifar10.Result("simclr", seed, 200.0, knn, 0.9, 30.0, "a card", [])
        (tmp_path / "results" / f"simclr-{seed}.json").write_text(json.dumps(result.__dict__))
    said = cifar10.table(tmp_path, cifar10._arguments([str(tmp_path), str(tmp_path), "--seeds", "0", "1", "2"]))
    assert "| simclr | 0 1 | 200 | 0.810 (0.800–0.820) | 0.900 | 30.0 | a card | .848 / 87 |" in said
    assert "simclr (seeds 2)" in said
    assert "moco (seeds 0, 1, 2)" in said
    assert "swav (no such objective here)" in said


@pytest.mark.slow
def test_calls_add_up(pictures: Path, tmp_path: Path) -> None:
    words = [BENCH / "cifar10.py", tmp_path, pictures, "--small", "--seeds", "0", "--set", "train.steps=4", "--rows"]
    assert "time is up in simclr" in run(*words, "simclr", "--minutes", "0.01").stdout
    assert not (tmp_path / "results").exists()
    assert "| simclr | 0 |" in run(*words, "simclr").stdout
    written = (tmp_path / "results" / "simclr-0.json").stat().st_mtime_ns
    said = run(*words, "simclr", "mae_vit").stdout
    assert "| mae_vit | 0 |" in said
    assert "simclr (seeds" not in said
    assert (tmp_path / "results" / "simclr-0.json").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "results" / "mae_vit-0.json").read_text())["knn"] > 0.5
