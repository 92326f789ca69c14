"""Labelled data in every form: class folders, tables, tagged words, masks; what is wrong is said in one sentence."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_finetune_kit import digits, write_images, write_tsv

from data.errors import UserError
from data.shards import DatasetWriter
from finetune.encoder import load_encoder
from finetune.run import finetune
from finetune.tasks import load_task, settle

pytest_plugins = ["test_finetune_kit"]


def folders(root: Path, count: int = 100) -> Path:
    """Digits as PNG files in class folders."""
    images, labels = digits()
    for i in range(count):
        (root / str(labels[i])).mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).convert("RGB").save(root / str(labels[i]) / f"{i:04d}.png")
    return root


def test_class_folders_and_tables_equal_shards(export: Path, tmp_path: Path) -> None:
    images, labels = digits()
    tree = folders(tmp_path / "tree")
    lines = [f"tree/{labels[i]}/{i:04d}.png,{labels[i]}" for i in range(100)]
    (tmp_path / "table.csv").write_text("\n".join(["path,class", *lines]))
    shards = write_images(tmp_path / "shards", images[:100], labels[:100], [str(n) for n in range(10)])
    test = write_images(tmp_path / "test", images[100:160], labels[100:160], [str(n) for n in range(10)])
    found = [
        finetune(export, train, test, report=lambda _: None, cpu=True)
        for train in (tree, tmp_path / "table.csv", shards)
    ]
    assert found[0]["classes"] == found[1]["classes"] == found[2]["classes"]
    assert found[1]["accuracy"] == found[2]["accuracy"]
    # The order of files differs, and with it the inner splits; the pictures do not.
    encoder = load_encoder(export)
    sums = []
    for train in (tree, shards):
        batch = load_task(train, test, encoder).train.batch(np.arange(100), torch.arange(100))
        sums.append(sorted(zip(batch.labels.tolist(), batch.images.sum(dim=(1, 2, 3)).tolist(), strict=True)))
    assert sums[0] == sums[1]
    assert found[0]["train"]["samples"] == 100
    held = load_task(tree, None, load_encoder(export))
    assert held.held_out
    assert len(held.train) + len(held.test) == 100


def test_bad_pictures_in_folders(export: Path, tmp_path: Path) -> None:
    encoder = load_encoder(export)
    tree = folders(tmp_path / "tree", 40)
    (tree / "heron").mkdir()
    with pytest.raises(UserError, match="heron holds no pictures"):
        load_task(tree, None, encoder)
    (tree / "heron").rmdir()
    for name in ("a.png", "b.png"):
        (tree / "0" / name).write_bytes(b"\x89PNG torn")
    task = load_task(tree, tree, encoder)
    with pytest.raises(UserError, match=r"a\.png cannot be decoded: .*\(and 1 more\)"):
        settle(task.train, print)
    with pytest.raises(UserError, match="cannot be decoded"):
        list(task.train.batches(64))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        load_task(tmp_path / "empty", None, encoder)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "x.png")
    with pytest.raises(UserError, match="no subfolders"):
        load_task(tmp_path / "flat", None, encoder)
    with pytest.raises(UserError, match="says nothing of regression"):
        load_task(tree, None, encoder, "regression")


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("classification", "file,label\nx.png,a\nmissing.png,b\n", "line 3: 'missing.png' is no picture file"),
        ("classification", "file,label\nx.png,a\nx.png,b\n", "line 3 names 'x.png' again"),
        ("classification", "file,label\nx.png,\ny.png,b\n", "line 2 has no label"),
        ("classification", "file,label\nnote.txt,a\n", "is no picture"),
        ("classification", "id,file,label\n1,x.png,a\n1,y.png,b\n", "line 3 has the id '1' of line 2"),
        ("classification", "file,label\n", "no labelled pictures"),
        ("regression", "file,value\nx.png,1\ny.png,nan\n", "line 3 has 'nan' where a finite number"),
        ("regression", "file,value\nx.png,1\ny.png,\n", "line 3 has '' where a finite number"),
        ("regression", "file,value\nx.png,2\ny.png,2\n", "the same value everywhere"),
        ("multi-label", "file,labels\nx.png,\ny.png,\n", "names no label at all"),
        ("classification", 'file,label\n"x.png,a\n', "line|columns"),
    ],
)
def test_bad_tables_of_pictures(task: str, content: str, message: str, export: Path, tmp_path: Path) -> None:
    for name in ("x.png", "y.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        load_task(tmp_path / "t.csv", None, load_encoder(export), task)  # type: ignore[arg-type]


def test_labels_in_the_json_part_of_shards(export: Path, tmp_path: Path) -> None:
    images, labels = digits()
    with DatasetWriter(tmp_path / "shards", "images", samples_per_shard=30) as writer:
        for i in range(60):
            Image.fromarray(images[i]).convert("RGB").save(tmp_path / "x.png")
            said = json.dumps({"labels": ["odd"] if labels[i] % 2 else [], "value": float(images[i].mean())})
            writer.add(f"{i:04d}", {"png": (tmp_path / "x.png").read_bytes(), "json": said.encode()})
    encoder = load_encoder(export)
    odd = load_task(tmp_path / "shards", tmp_path / "shards", encoder, "multi-label")
    assert odd.train.truth(np.arange(60))[:, 0].tolist() == (labels[:60] % 2).tolist()
    plain = write_images(tmp_path / "plain", images[:20], labels[:20], [str(n) for n in range(10)])
    with pytest.raises(UserError, match=r"no \.json part"):
        load_task(plain, None, encoder, "regression")


def test_unseen_labels_in_the_test_set(export: Path, text_export: Path, tmp_path: Path) -> None:
    train, test = tmp_path / "train.tsv", tmp_path / "test.tsv"
    train.write_text("text\tlabels\ngood film\tpos|film\nbad\tneg\n")
    test.write_text("text\tlabels\ngood\tpos|heron\n")
    with pytest.raises(UserError, match="'heron', which the training data lacks"):
        load_task(train, test, load_encoder(text_export), "multi-label")
    train.write_text("good\tX\nfilm\tO\n\nbad\tX\n")
    test.write_text("good\tY\n")
    with pytest.raises(UserError, match="the tag 'Y', which the training data lacks"):
        load_task(train, test, load_encoder(text_export), "tokens")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "good\nfilm\tO\n", "line 1 needs a word and a tag"),
        ("a.tsv", "good\tX\nfilm\tX\n", "the one tag 'X'"),
        ("a.tsv", "\n\n", "no words with tags"),
        ("a.jsonl", '{"tokens": ["a", "b"], "tags": ["X"]}', "no lists of equal length"),
        ("a.jsonl", '{"tokens": ["a", ""], "tags": ["X", "Y"]}', "empty token or tag"),
        ("a.jsonl", '{"text": "a"}', "needs the fields 'tokens' and 'tags'"),
        ("a.xml", "<a/>", "unknown format"),
    ],
)
def test_bad_tagged_text(name: str, content: str, message: str, text_export: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_task(tmp_path / name, None, load_encoder(text_export), "tokens")


def test_tagged_text_in_both_formats_is_the_same(text_export: Path, tmp_path: Path) -> None:
    encoder = load_encoder(text_export)
    (tmp_path / "a.conll").write_text("-DOCSTART- -X- O\n\ngood NN B-x\nfilm NN O\n\nbad JJ O\n")
    rows = [{"tokens": ["good", "film"], "tags": ["B-x", "O"]}, {"tokens": ["bad"], "tags": ["O"]}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = (load_task(tmp_path / name, tmp_path / name, encoder, "tokens") for name in ("a.conll", "a.jsonl"))
    assert one.fingerprints == two.fingerprints
    assert one.classes == ["B-x", "O"]
    assert one.train.truth(np.arange(2)).tolist() == two.train.truth(np.arange(2)).tolist()


def test_bad_masks(export: Path, tmp_path: Path) -> None:
    encoder = load_encoder(export)
    pictures, masks = tmp_path / "images", tmp_path / "masks"
    with pytest.raises(UserError, match=r"does not exist|no folders|holds"):
        load_task(tmp_path, None, encoder, "segmentation")
    pictures.mkdir()
    masks.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 12)).save(pictures / f"{i}.png")
        Image.fromarray(np.full((12, 16), i % 2, dtype=np.uint8)).save(masks / f"{i}.png")
    assert load_task(tmp_path, tmp_path, encoder, "segmentation").classes == ["0", "1"]

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_task(tmp_path, None, encoder, "segmentation")

    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(masks / "3.png")
    refused("has 8 x 8 pixels, its picture 16 x 12")
    Image.new("RGB", (16, 12)).save(masks / "3.png")
    refused("in colour")
    (masks / "3.png").write_bytes(b"torn")
    refused("cannot be read")
    (masks / "3.png").unlink()
    refused("'3' is in .*images but not in .*masks")
    (pictures / "3.png").unlink()
    (tmp_path / "classes.txt").write_text("ground\n")
    refused("there are 1 classes|one class")


def test_masks_in_shards(export: Path, tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "shards", "images", samples_per_shard=3) as writer:
        for i in range(6):
            Image.new("RGB", (16, 12), (40 * i, 0, 0)).save(tmp_path / "x.jpg")
            Image.fromarray(np.full((12, 16), i % 2, dtype=np.uint8)).save(tmp_path / "m.png")
            parts = {"jpg": (tmp_path / "x.jpg").read_bytes(), "mask.png": (tmp_path / "m.png").read_bytes()}
            writer.add(f"{i:04d}", parts)
    task = load_task(tmp_path / "shards", tmp_path / "shards", load_encoder(export), "segmentation")
    truth = task.train.truth(np.arange(6))
    assert [int(each.unique()) for each in truth] == [0, 1, 0, 1, 0, 1]


def test_tasks_that_do_not_suit_the_encoder(export: Path, text_export: Path, tmp_path: Path) -> None:
    table = write_tsv(tmp_path / "a.tsv", ["x", "y"], ["1", "2"])
    with pytest.raises(UserError, match="encoder is for images"):
        load_task(table, None, load_encoder(export), "tokens")
    with pytest.raises(UserError, match="encoder is for text"):
        load_task(table, None, load_encoder(text_export), "segmentation")
