"""Predictions stream in order, whatever they are read from; what is written comes back; bad inputs are named."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image
from test_finetune_kit import digits

from data.errors import UserError
from finetune.model import TaskModel, load_model
from finetune.predict import BATCH, Skipped, stream
from finetune.prediction_inputs import texts
from finetune.prediction_output import written_rows
from finetune.run import finetune
from launch.cli import main

pytest_plugins = ["test_finetune_kit"]
ODD = ['a "quoted", film', "tab\there", "two\nlines", "naïve 東京 🚂", " ", "=1+1", "semi;colon"]


@pytest.fixture(scope="module")
def text_folder(text_export: Path, sentiment: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of sentences."""
    out = tmp_path_factory.mktemp("model") / "m"
    finetune(text_export, *sentiment, output=out, report=lambda _: None, cpu=True)
    return out


@pytest.fixture(scope="module")
def picture_folder(export: Path, digit_shards: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of digits."""
    out = tmp_path_factory.mktemp("model") / "m"
    finetune(export, *digit_shards, labels_per_class=5, output=out, report=lambda _: None, cpu=True)
    return out


def _rows(text: str, layout: str) -> list[dict[str, str]]:
    if layout == "jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("layout", ["csv", "jsonl"])
def test_what_is_written_comes_back(layout: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{layout}"
    with written_rows(path) as write:
        for number, name in enumerate(ODD):
            write({"input": name, "label": name[::-1], "probability": number / 7})
        assert not path.exists()
    found = _rows(path.read_text(), layout)
    assert [row["input"] for row in found] == ODD
    assert [row["label"] for row in found] == [name[::-1] for name in ODD]
    assert [float(row["probability"]) for row in found] == [number / 7 for number in range(len(ODD))]
    # TSV knows no quoting: each row stays one line of as many cells.
    with written_rows(tmp_path / "rows.tsv") as write:
        for name in ODD:
            write({"input": name, "label": "x"})
    lines = (tmp_path / "rows.tsv").read_text().split("\n")
    assert [line.count("\t") for line in lines] == [1] * (len(ODD) + 1) + [0]


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def stopped() -> None:
        with written_rows(tmp_path / "rows.csv") as write:
            write({"input": "a"})
            raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        stopped()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"\.csv, \.tsv or \.jsonl"), written_rows(tmp_path / "rows.xml"):
        pass
    with written_rows(tmp_path / "rows.xml", "jsonl") as write:
        write({"input": "a"})
    assert json.loads((tmp_path / "rows.xml").read_text()) == {"input": "a"}


def test_texts_are_the_same_from_everywhere(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["a good film", 'the "bad" one', "naïve 東京 was dull", "it, was; great"]
    plain = tmp_path / "lines.txt"
    plain.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    with open(tmp_path / "table.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "words"], *([i, line] for i, line in enumerate(lines))])
    objects = "".join(json.dumps({"n": i, "Words": line}) + "\n" for i, line in enumerate(lines))
    (tmp_path / "table.jsonl").write_text(objects)
    printed = []
    for words in (
        [str(plain)],
        lines,
        [str(tmp_path / "table.csv"), "--column", "words"],
        [str(tmp_path / "table.jsonl"), "--column", "Words"],
        [str(tmp_path / "*.txt")],
        ["-"],
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(plain.read_text()))
        assert main(["predict", str(text_folder), *words, "--format", "csv", "--top", "2"]) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1
    rows = _rows(printed[0], "csv")
    assert [row["input"] for row in rows] == lines
    for row in rows:
        assert {row["label"], row["label_2"]} == {"neg", "pos"}
        assert float(row["probability"]) >= float(row["probability_2"])
        assert float(row["probability"]) + float(row["probability_2"]) == pytest.approx(1)
    for words, message in [
        (["absent.csv"], "does not exist"),
        ([str(tmp_path / "table.csv"), "--column", "text"], "no column 'text'; its columns are id, words"),
        ([str(tmp_path / "table.jsonl")], "line 1 is no JSON object with the field 'text'"),
        ([str(plain), "--top", "3"], "the model has 2"),
    ]:
        assert main(["predict", str(text_folder), *words]) == 2
        assert message in capsys.readouterr().err
    # A cell may hold line breaks; a row does not end there.
    (tmp_path / "broken.csv").write_text('text\n"two\nlines"\nlast\n')
    assert list(texts([tmp_path / "broken.csv"])) == ["two\nlines", "last"]


def test_pictures_stream_in_order_with_the_unreadable_in_place(
    picture_folder: Path, digit_shards: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, _ = digits()
    new = tmp_path / "new"
    new.mkdir()
    for i in range(BATCH + 5):
        Image.fromarray(images[i]).convert("RGB").save(new / f"{i:04d}.png")
    (new / "0003.png").write_bytes(b"\x89PNG torn")
    model = load_model(picture_folder)
    assert isinstance(model, TaskModel)
    found = list(stream(model, [new]))
    assert [isinstance(each, Skipped) for each in found] == [i == 3 for i in range(BATCH + 5)]
    names = [each.input if isinstance(each, Skipped) else each["input"] for each in found]
    assert names == [str(new / f"{i:04d}.png") for i in range(BATCH + 5)]
    assert main(["predict", str(picture_folder), str(new / "000*.png"), "--output", str(tmp_path / "o.csv")]) == 1
    assert "0003.png" in capsys.readouterr().err
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 10
    # Shards hold the same pictures as the files did; only the names differ.
    shards = list(stream(model, [digit_shards[0]]))
    assert len(shards) == 1200
    for one, other in zip(found[4:20], shards[4:20], strict=True):
        assert isinstance(one, dict)
        assert isinstance(other, dict)
        assert one["label"] == other["label"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_memory_does_not_grow_with_the_inputs(picture_folder: Path, tmp_path: Path) -> None:
    """Rows come while later inputs are still unread: a second batch is read only after the first is out."""
    images, _ = digits()
    for i in range(2 * BATCH):
        Image.fromarray(images[i]).convert("RGB").save(tmp_path / f"{i:04d}.png")
    rows = stream(load_model(picture_folder), [tmp_path])
    next(rows)
    (tmp_path / f"{2 * BATCH - 1:04d}.png").unlink()
    rest = list(rows)
    assert isinstance(rest[-1], Skipped)
    assert not isinstance(rest[-2], Skipped)
