"""Tasks of several kinds over one encoder: each is judged by its own merit, and its model predicts what it learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_finetune_kit import NAMES, digits, write_images
from test_finetune_targets import label_sets, masks, quantities, tags, text_quantities

from data.errors import UserError
from finetune.evaluation import evaluate
from finetune.multitask import multitask
from finetune.run import finetune
from launch.cli import main

pytest_plugins = ["test_finetune_kit"]
QUICK: dict[str, Any] = {"cpu": True, "min_steps": 8, "epochs": 1.0, "batch_size": 32, "lr": 2e-3}


def _silent(_: str) -> None:
    pass


def _made(root: Path, make: Any) -> tuple[Path, Path]:
    root.mkdir()
    train, test = make(root)
    return train, test


def test_pictures_are_classified_marked_and_segmented_together(export: Path, tmp_path: Path) -> None:
    images, labels = digits()
    shards = [write_images(tmp_path / f"digits{n}", images[n : n + 100], labels[n : n + 100], NAMES) for n in (0, 100)]
    makes = {"kinds": label_sets, "scenes": masks}
    tasks: dict[str, Any] = {name: _made(tmp_path / name, make) for name, make in makes.items()}
    kinds = {"kinds": "multi-label", "scenes": "segmentation"}
    out, said = tmp_path / "m", list[str]()
    results = multitask(export, tasks | {"digit": tuple(shards)}, kinds=kinds, output=out, report=said.append, **QUICK)
    merits = {"kinds": "micro_f1", "scenes": "miou", "digit": "accuracy"}
    for name, merit in merits.items():
        found = results["tasks"][name]
        assert found.get("merit", "accuracy") == merit
        test = shards[1] if name == "digit" else tasks[name][1]
        assert evaluate(out / name, test, report=_silent, cpu=True)[merit] == pytest.approx(found["joint"][merit])
        assert found["lead"]["difference"] == pytest.approx(found["joint"][merit] - found["alone"][merit])
        low, high = found["joint"]["interval"]
        assert low <= found["joint"][merit] <= high
    assert set(results["tasks"]["kinds"]["baseline"]) == {"micro_f1", "macro_f1", "map"}
    assert any(line.startswith("scenes, joint, seed 0: mIoU 0.") for line in said)
    assert json.loads((out / "results.json").read_text()) == results


def test_tagged_words_and_a_number_share_a_text_encoder(
    text_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, length = _made(tmp_path / "words", tags), _made(tmp_path / "length", text_quantities)
    settings = ["lr=2e-3", "min_steps=6", "epochs=0.5", "cpu=true"]
    named = [f"words={words[0]}:{words[1]}", f"length={length[0]}:{length[1]}", *settings]
    kinds = ["--task", "words=tokens", "--task", "length=regression"]
    assert main(["multitask", str(text_export), *named, *kinds, "--output", str(tmp_path / "m")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("words: F1 0.")
    assert lines[1].startswith("length: R² ")
    assert "points" not in lines[1]
    refused = {
        "words": "--task words is no kind of a task",
        "words=tokens": "--task words=tokens is no kind of a task",
        "word=tokens": "there is no task 'word' to be of the kind tokens",
        "length=size": "there is no task 'size'",
    }
    for pair, reason in refused.items():
        assert main(["multitask", str(text_export), *named, "--task", "words=tokens", "--task", pair]) == 2
        assert reason in capsys.readouterr().err


def test_one_task_of_another_kind_is_that_task_alone(export: Path, tmp_path: Path) -> None:
    pair = _made(tmp_path / "ink", quantities)
    options = {"report": _silent, **QUICK}
    found = multitask(export, {"ink": pair}, kinds={"ink": "regression"}, **options)["tasks"]["ink"]
    alone = finetune(export, *pair, task="regression", strategy="full", **options)
    assert found["alone"]["r2"] == alone["r2"]
    assert found["alone"]["interval"] == alone["interval"]
    assert found["joint"]["r2"] == pytest.approx(alone["r2"], abs=0.005)
    with pytest.raises(UserError, match="balance, mixup and cutmix are for classification"):
        multitask(export, {"ink": pair}, kinds={"ink": "regression"}, balance=True, **options)
