"""The study cannot be fooled: it finds a benefit where there is one, and none in noise."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import DATASETS
from test_finetune_kit import NAMES, digits, write_encoder, write_images

from data.image_shards import Choices as Sharding
from data.image_shards import shard_images
from finetune.advise.study import Choices, advise
from finetune.run import finetune

pytest_plugins = ["test_finetune_kit"]
STEPS = {"cpu": True, "min_steps": 40, "epochs": 2.0}


def _silent(_: str) -> None:
    pass


def _study(encoder: Path, train: Path, test: Path, out: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"budgets": ["20", "150"], "strategies": ["majority", "knn", "linear"], "seeds": 3}
    options |= {"settings": STEPS} | changes
    return advise(encoder, train, test, out, choices=Choices(**options), report=_silent)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Digits to train an encoder on, and others to study it with; and an encoder that learned from the first."""
    images, labels = digits()
    root = tmp_path_factory.mktemp("halves")
    parts = {"first": slice(0, 800), "train": slice(800, 1300), "test": slice(1300, 1797)}
    found = {name: write_images(root / name, images[part], labels[part], NAMES) for name, part in parts.items()}
    untrained = write_encoder(root / "untrained", seed=11)
    learning = STEPS | {"min_steps": 500, "lr": 2e-3, "layer_decay": 1.0}
    finetune(untrained, found["first"], found["test"], strategy="full", output=root / "m", report=_silent, **learning)
    return found | {"untrained": untrained, "trained": root / "m" / "encoder"}


@pytest.mark.slow
def test_an_encoder_that_is_better_is_found(halves: dict[str, Path], tmp_path: Path) -> None:
    results = _study(halves["trained"], halves["train"], halves["test"], tmp_path / "out")
    assert results["recommendation"]["benefit"] is True
    assert "commonest class" not in results["recommendation"]["text"]
    assert "Pre-training is worth" in results["recommendation"]["text"]
    assert results["benefit"][0]["difference"] > 0.1


@pytest.mark.slow
def test_an_untrained_source_gives_no_benefit(halves: dict[str, Path], tmp_path: Path) -> None:
    results = _study(halves["untrained"], halves["train"], halves["test"], tmp_path / "out")
    assert results["recommendation"]["benefit"] is False
    assert "No measurable benefit" in results["recommendation"]["text"]


@pytest.mark.slow
def test_shuffled_labels_give_chance_and_no_benefit(halves: dict[str, Path], tmp_path: Path) -> None:
    images, labels = digits(shuffled=True)
    train = write_images(tmp_path / "train", images[800:1300], labels[800:1300], NAMES)
    test = write_images(tmp_path / "test", images[1300:], labels[1300:], NAMES)
    results = _study(halves["trained"], train, test, tmp_path / "out")
    assert results["recommendation"]["benefit"] is False
    assert "commonest class" in results["recommendation"]["text"]
    for row in results["accuracy"]:
        assert row["accuracy"] == pytest.approx(0.1, abs=0.05)
    assert all("chance" in law["reason"] for law in results["power_laws"])


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """CIFAR-10: training pictures for an encoder, others to study it with, and the same under shuffled labels."""
    archive = DATASETS / "cifar10.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive.name} is not beside the repository (../shared/datasets)")
    root = tmp_path_factory.mktemp("cifar")
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            parts = member.name.split("/")
            if parts[0] != "train":
                break
            number = int(Path(parts[-1]).stem) if member.isfile() else 10_000
            side = "first" if number < 300 else "train" if number < 400 else "test" if number < 480 else ""
            if side:
                member.name = "/".join([side, *parts[1:]])
                tar.extract(member, root, filter="data")
    for side in ("first", "train", "test"):
        shard_images(root / side, root / f"{side}-shards", Sharding(), workers=1)
    untrained = write_encoder(root / "untrained", seed=11)  # sees pictures at 16 pixels a side
    sides = {side: root / f"{side}-shards" for side in ("first", "train", "test")}
    learning = STEPS | {"min_steps": 600, "lr": 2e-3, "layer_decay": 1.0, "flip": 0.5}
    finetune(untrained, sides["first"], sides["test"], strategy="full", output=root / "m", report=_silent, **learning)
    return sides | {"untrained": untrained, "trained": root / "m" / "encoder", "root": root}


EVERYTHING = {"strategies": ["majority", "knn", "linear", "full", "scratch"], "budgets": ["30", "100", "300"]}


@pytest.mark.slow
def test_cifar_with_a_better_encoder(cifar: dict[str, Path], tmp_path: Path) -> None:
    results = _study(cifar["trained"], cifar["train"], cifar["test"], tmp_path / "out", **EVERYTHING)
    assert results["recommendation"]["benefit"] is True
    assert any(row["multiplier"] is None or row["multiplier"] > 1 for row in results["multipliers"])


@pytest.mark.slow
def test_cifar_with_an_untrained_source(cifar: dict[str, Path], tmp_path: Path) -> None:
    results = _study(cifar["untrained"], cifar["train"], cifar["test"], tmp_path / "out", **EVERYTHING)
    assert results["recommendation"]["benefit"] is False


@pytest.mark.slow
def test_cifar_with_shuffled_labels(cifar: dict[str, Path], tmp_path: Path) -> None:
    """Pictures keep their label's place in the folder tree, but a permutation of all files decides which is where."""
    draw = np.random.Generator(np.random.Philox(12))
    sides = {}
    for side in ("train", "test"):
        files = sorted((cifar["root"] / side).rglob("*.jpg"))
        for place, source in zip(draw.permutation(len(files)), files, strict=True):
            target = tmp_path / side / files[place].parent.name / f"{source.parent.name}-{source.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
        shard_images(tmp_path / side, tmp_path / f"{side}-shards", Sharding(), workers=1)
        sides[side] = tmp_path / f"{side}-shards"
    results = _study(cifar["trained"], sides["train"], sides["test"], tmp_path / "out", **EVERYTHING)
    assert results["recommendation"]["benefit"] is False
    for row in results["accuracy"]:
        assert row["accuracy"] == pytest.approx(0.1, abs=0.04)
