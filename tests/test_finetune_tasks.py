"""Labelled data: read as it is meant, matched by name, and refused in one clear sentence."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from test_finetune_kit import NAMES, digits, sentences, write_images, write_tsv

from data.errors import UserError
from finetune.encoder import load_encoder
from finetune.labelled_text import read_labelled_text
from finetune.run import finetune
from finetune.samples import TextSamples
from finetune.tasks import load_task

pytest_plugins = ["test_finetune_kit"]


def _jsonl(path: Path, texts: list[str], labels: list[str]) -> Path:
    path.write_text("".join(json.dumps({"Text": t, "label": c}) + "\n" for t, c in zip(texts, labels, strict=True)))
    return path


def _csv(path: Path, texts: list[str], labels: list[str]) -> Path:
    path.write_text("label,sentence\n" + "".join(f'{c},"{t}"\n' for t, c in zip(texts, labels, strict=True)))
    return path


def _folders(path: Path, texts: list[str], labels: list[str]) -> Path:
    for i, (text, label) in enumerate(zip(texts, labels, strict=True)):
        (path / label).mkdir(parents=True, exist_ok=True)
        (path / label / f"{i:04d}.txt").write_text(text)
    return path


Writer = Callable[[Path, list[str], list[str]], Path]


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_tsv, "a.tsv"), (_csv, "a.csv"), (_jsonl, "a.jsonl"), (_folders, "a")],
)
def test_every_format_holds_the_same_pairs(write: Writer, name: str, tmp_path: Path) -> None:
    texts, labels = sentences(30, seed=3)
    read = read_labelled_text(write(tmp_path / name, texts, labels))
    assert sorted(zip(read.texts, read.labels, strict=True)) == sorted(zip(texts, labels, strict=True))
    assert read.classes() == ["neg", "pos"]


def test_tsv_with_and_without_header_and_quotation_marks(tmp_path: Path) -> None:
    texts, labels = ['he said " no', "it's 5 o'clock", '"'], ["0", "1", "10"]
    bare = read_labelled_text(write_tsv(tmp_path / "bare.tsv", texts, labels))
    headed = read_labelled_text(write_tsv(tmp_path / "headed.tsv", texts, labels, header="Sentence\tLabel\n"))
    assert bare.texts == headed.texts == texts
    assert bare.classes() == ["0", "1", "10"]
    assert bare.fingerprint == headed.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "good\t1\nbad\n", "line 2 has 1 columns"),
        ("a.tsv", "good\t\nbad\t0\n", "line 1 has no label"),
        ("a.tsv", "\t1\n", "line 1 has no text"),
        ("a.tsv", "only text\n", "1 columns and no header"),
        ("a.tsv", "", "0 columns|no labelled"),
        ("a.csv", "a,b,c\n1,2,3\n", "3 columns and no header"),
        ("a.jsonl", '{"text": "x"}\n', "needs the fields"),
        ("a.jsonl", "[1]\n", "no JSON object"),
        ("a.xml", "<a/>", "unknown format"),
        ("a.tsv", "".join(f"{i % 2}\ttext {i}\n" for i in range(30)), "another column"),
    ],
)
def test_bad_text_files(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_labelled_text(tmp_path / name)


def test_missing_and_empty_text_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_labelled_text(tmp_path / "none.tsv")
    with pytest.raises(UserError, match="no subfolders"):
        read_labelled_text(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.txt"):
        read_labelled_text(tmp_path)


def test_classes_are_matched_by_name_not_by_number(export: Path, tmp_path: Path) -> None:
    images, labels = digits()
    train = write_images(tmp_path / "train", images[:300], labels[:300], NAMES)
    backwards = write_images(tmp_path / "test", images[300:400], 9 - labels[300:400], NAMES[::-1])
    task = load_task(train, backwards, load_encoder(export))
    assert (task.test.labels == labels[300:400]).all()


def test_image_data_that_cannot_be_learned_from(export: Path, text_export: Path, tmp_path: Path) -> None:
    encoder = load_encoder(export)
    images, labels = digits()
    without = write_images(tmp_path / "without", images[:20], np.full(20, -1), [])
    with pytest.raises(UserError, match="no labels"):
        load_task(without, None, encoder)
    few = write_images(tmp_path / "few", images[:300][labels[:300] != 4], labels[:300][labels[:300] != 4], NAMES)
    with pytest.raises(UserError, match="class '4' but has no sample"):
        load_task(few, None, encoder)
    good = write_images(tmp_path / "good", images[:300], labels[:300], NAMES)
    odd = write_images(tmp_path / "odd", images[:20], labels[:20] % 2, ["0", "heron"])
    with pytest.raises(UserError, match="'heron', which the training data lacks"):
        load_task(good, odd, encoder)
    one = write_images(tmp_path / "one", images[:20], np.zeros(20, dtype=np.int64), ["all"])
    with pytest.raises(UserError, match="two or more"):
        load_task(one, None, encoder)
    with pytest.raises(UserError, match="does not exist"):
        load_task(good, tmp_path / "absent", encoder)
    with pytest.raises(UserError, match="line 1: 'x' is no picture file"):
        load_task(write_tsv(tmp_path / "a.tsv", ["x"], ["1"]), None, encoder)
    with pytest.raises(UserError, match="no labels for text"):
        load_task(good, None, load_encoder(text_export))


def test_unseen_text_labels(text_export: Path, tmp_path: Path) -> None:
    train = write_tsv(tmp_path / "train.tsv", *sentences(20, 0))
    test = write_tsv(tmp_path / "test.tsv", ["fine"], ["mixed"])
    with pytest.raises(UserError, match="'mixed', which the training data lacks"):
        load_task(train, test, load_encoder(text_export))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "liner"}, "no strategy 'liner'"),
        ({"task": "poetry"}, "no task"),
        ({"seeds": []}, "one seed"),
        ({"labels_per_class": 0}, "one label a class"),
        ({"lerning_rate": 1.0}, "no setting 'lerning_rate'"),
        ({"layer_decy": 0.5}, "did you mean 'layer_decay'"),
        ({"layer_decay": 2.0}, "layer_decay=2.0 is not possible"),
    ],
)
def test_bad_calls(options: dict, message: str, export: Path, digit_shards: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=message):
        finetune(export, *digit_shards, report=lambda _: None, **options)


def test_without_a_test_set_a_fifth_is_held_out_and_said_so(export: Path, digit_shards: tuple[Path, Path]) -> None:
    said: list[str] = []
    encoder = load_encoder(export)
    task = load_task(digit_shards[0], None, encoder)
    assert not np.intersect1d(task.train.ids, task.test.ids).size
    assert len(task.train) + len(task.test) == 1200
    assert len(task.test) == pytest.approx(240, abs=6)
    results = finetune(encoder, task, labels_per_class=2, report=said.append)
    assert results["test"]["held_out"] is True
    assert any("held out" in line for line in said)


def test_text_features_ignore_padding_and_neighbours(text_export: Path) -> None:
    texts = ["good", "the film was of a dull kind and it was bad", "a fine " * 40]
    for pooling in ("mean", "last"):
        encoder = load_encoder(text_export, pooling).eval()
        rows = encoder.tokenize(texts)
        assert [row[0] for row in rows] == [encoder.bos] * 3
        assert all(row[-1] == encoder.eos and len(row) <= encoder.context for row in rows)
        ids = torch.arange(3)
        with torch.no_grad():
            together = encoder(encoder.batch(rows, ids, ids))
            alone = torch.cat([encoder(encoder.batch([row], ids[:1], ids[:1])) for row in rows])
            bare = encoder.model(torch.from_numpy(rows[0])[None])[0]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        expected = bare.mean(dim=0) if pooling == "mean" else bare[-1]
        torch.testing.assert_close(together[0], expected, rtol=1e-4, atol=1e-5)


def test_inference_batches_hold_every_text_once(text_export: Path) -> None:
    encoder = load_encoder(text_export)
    texts, _ = sentences(23, seed=4)
    samples = TextSamples(encoder.tokenize(texts), np.zeros(23, dtype=np.int64), encoder)
    seen = np.concatenate([positions for positions, _ in samples.batches(5)])
    assert sorted(seen) == list(range(23))
