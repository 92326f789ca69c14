"""Predictions of models that are no classification say what the same models say when they are judged."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_finetune_kit import digits, sentences
from test_finetune_targets import label_sets, masks, quantities, tags

from data.errors import UserError
from finetune.dense_predictions import whole_mask
from finetune.evaluation import evaluate
from finetune.masks import UNKNOWN
from finetune.model import load_model
from finetune.predict import predict
from finetune.run import finetune
from launch.cli import main

pytest_plugins = ["test_finetune_kit"]


def _silent(_: str) -> None:
    pass


def _model(source: Path, train: Path, test: Path, task: str, out: Path) -> Path:
    # A set penalty saves the search for one.
    finetune(source, train, test, task=task, output=out, strength=1.0, report=_silent, cpu=True)
    return out


def _items(model: Path, test: Path, out: Path) -> list[dict[str, str]]:
    evaluate(model, test, output=out, report=_silent, cpu=True)
    with open(out / "items.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_word_gets_the_tag_that_is_judged(
    text_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = tags(tmp_path)
    long = " ".join(sentences(12, 9)[0]).split()
    assert len(long) > load_model(_model(text_export, train, test, "tokens", tmp_path / "m")).encoder.context  # type: ignore[attr-defined]
    test.write_text(test.read_text() + "\n" + "".join(f"{word}\tO\n" for word in long))
    judged: dict[str, list[str]] = {}
    for row in _items(tmp_path / "m", test, tmp_path / "out"):
        judged.setdefault(row["item"], []).extend(json.loads(row["predictions"]))
    texts = sentences(80, 2)[0] + [" ".join(long)]
    (tmp_path / "new.txt").write_text("\n".join(texts))
    (tmp_path / "new.jsonl").write_text("\n".join(json.dumps({"tokens": text.split()}) for text in texts))
    capsys.readouterr()
    for name in ("new.txt", "new.jsonl"):
        assert main(["predict", str(tmp_path / "m"), str(tmp_path / name)]) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["input"] for row in rows] == texts
        assert [row["words"] for row in rows] == [text.split() for text in texts]
        # A text that occurs several times is judged as often.
        assert [row["tags"] for row in rows] == [judged[text][: len(text.split())] for text in texts]
    assert len({tag for row in rows for tag in row["tags"]}) > 1
    assert main(["predict", str(tmp_path / "m"), " ", "a good film", "--output", str(tmp_path / "said.csv")]) == 0
    with open(tmp_path / "said.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [json.loads(row["words"]) for row in found] == [[], ["a", "good", "film"]]
    assert [len(json.loads(row["tags"])) for row in found] == [0, 3]


def test_predicted_masks_are_truth_that_the_model_agrees_with(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = masks(tmp_path)
    model = str(_model(export, train, test, "segmentation", tmp_path / "m"))
    wide = np.tile(digits()[0][0], (3, 6))
    Image.fromarray(wide).convert("RGB").save(test / "images" / "wide.png")
    (tmp_path / "more").mkdir()
    Image.fromarray(wide).convert("RGB").resize((16, 16)).save(tmp_path / "more" / "wide.png")
    (tmp_path / "more" / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "masks"
    assert main(["predict", model, str(test / "images"), str(tmp_path / "more"), "--output", str(out)]) == 1
    assert "unreadable" in capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["mask"] for row in rows}) == 62
    by_name = {row["input"]: out / row["mask"] for row in rows}
    assert by_name[str(tmp_path / "more" / "wide.png")].name == "wide-2.png"
    mask = np.asarray(Image.open(by_name[str(test / "images" / "wide.png")]))
    assert mask.shape == (24, 48)
    assert (mask[:, :12] == UNKNOWN).all()
    assert (mask[:, 36:] == UNKNOWN).all()
    assert (mask[:, 12:36] < 2).all()
    for row in rows[:3]:
        known = np.asarray(Image.open(out / row["mask"]))
        for number, name in enumerate(("ground", "digit")):
            assert row["shares"].get(name, 0.0) == pytest.approx(float((known == number).mean()))
    # What was predicted is a labelled set, on which the model is right everywhere.
    (test / "images" / "wide.png").unlink()
    for name in ("wide", "wide-2"):
        (out / "masks" / f"{name}.png").unlink()
    (test / "images").rename(out / "images")
    results = evaluate(model, out, report=_silent, cpu=True)
    assert results["miou"] == results["pixel_accuracy"] == 1.0
    assert results["test"]["samples"] == 60

    words = ["predict", model, str(out / "images")]
    assert main(words) == main([*words, "--output", str(out)]) == 2
    assert "give a folder for them with --output" in capsys.readouterr().err
    assert main([*words, "--output", str(out / "new"), "--format", "csv"]) == 2
    assert main([*words, "--output", str(tmp_path / "none"), "--top", "2"]) == 2
    assert not (tmp_path / "none").exists()
    assert main(["predict", model, str(tmp_path / "more" / "wide.png"), "--output", str(out), "--overwrite"]) == 0
    assert [path.name for path in (out / "masks").iterdir()] == ["wide.png"]
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_a_mask_covers_the_square_that_the_encoder_sees() -> None:
    view = torch.tensor([[0, 1], [2, 3]])
    assert whole_mask(view, (2, 2), (2, 2)).tolist() == view.tolist()
    assert whole_mask(view, (2, 4), (4, 8)).tolist() == [
        [255, 255, 0, 0, 1, 1, 255, 255],
        [255, 255, 0, 0, 1, 1, 255, 255],
        [255, 255, 2, 2, 3, 3, 255, 255],
        [255, 255, 2, 2, 3, 3, 255, 255],
    ]


@pytest.mark.parametrize("task", ["multi-label", "regression"])
def test_rows_in_every_format_say_what_is_judged(
    task: str, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = (label_sets if task == "multi-label" else quantities)(tmp_path)
    model = _model(export, train, test, task, tmp_path / "m")
    judged = _items(model, test, tmp_path / "out")
    files = [row["item"] for row in judged]

    def check(rows: list[dict[str, Any]], exact: float) -> None:
        assert [row["input"] for row in rows] == files
        if task == "regression":
            said = [float(row["value"]) for row in rows]
            assert said == pytest.approx([float(row["value_prediction"]) for row in judged], rel=exact)
            return
        lists = [
            [json.loads(row[n]) if isinstance(row[n], str) else row[n] for n in row if n != "input"] for row in rows
        ]
        assert [labels for labels, _ in lists] == [json.loads(row["predictions"]) for row in judged]
        assert all(len(labels) == len(p) and all(each >= 0.5 for each in p) for labels, p in lists)
        assert len({len(labels) for labels, _ in lists}) > 1

    capsys.readouterr()
    for layout in ("csv", "jsonl", "tsv"):
        path = tmp_path / f"rows.{layout}"
        assert main(["predict", str(model), str(test.parent / "test"), "--output", str(path)]) == 0
        text = path.read_text()
        if layout == "jsonl":
            check([json.loads(line) for line in text.splitlines()], 1e-4)
        else:
            check(list(csv.DictReader(io.StringIO(text), dialect="excel" if layout == "csv" else _Tabs)), 1e-4)
    assert main(["predict", str(model), files[0], "--top", "2"]) == 2
    assert f"the model is for {task}" in capsys.readouterr().err
    with pytest.raises(UserError, match="take the rows of stream"):
        predict(load_model(model), files[:1])


class _Tabs(csv.Dialect):
    """Cells between tabs, without quoting."""

    delimiter, lineterminator, quoting = "\t", "\n", csv.QUOTE_NONE
