"""Laws of sharding pictures: every readable file once with its label, the rest named, the same bytes twice."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import picture

from data.dataset import ShardedDataset
from data.errors import UserError
from data.image_shards import Choices, shard_images
from data.inspect import inspect
from data.loader import sequential


def fill(root: Path, *names: str) -> dict[str, bytes]:
    """Pictures under these names; each different, each of the format its name says."""
    files = {}
    for number, name in enumerate(names):
        format = {"jpg": "JPEG", "jpeg": "JPEG"}.get(name.rsplit(".", 1)[-1].lower(), "PNG")
        files[name] = picture(number, format=format)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(files[name])
    return files


def shards(source: Path, out: Path, **arguments: object) -> tuple[dict, ShardedDataset]:
    outer = {name: arguments.pop(name) for name in ("workers", "part", "overwrite") if name in arguments}
    summary = shard_images(source, out, Choices(**arguments), progress=False, **outer)  # type: ignore[arg-type]
    return summary, ShardedDataset(out)


def held(dataset: ShardedDataset) -> dict[bytes, str | None]:
    """Bytes -> class name of everything in the dataset."""
    samples = [dataset.image(identity) for identity in range(len(dataset))]
    assert len({payload for payload, _ in samples}) == len(samples)
    return {payload: dataset.classes[label] if label >= 0 else None for payload, label in samples}


def test_labels_come_from_the_first_folder(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = fill(source, "cat/1.png", "cat/deep/er/2.JPG", "dog/1.png", "dog/x.jpeg", "loose.png")
    (source / "dog" / "notes.txt").write_text("not a picture, by its name")
    (source / "empty").mkdir()
    fill(source, ".hidden/3.png", "cat/._resource.png", "cat/.thumbs/4.png")
    summary, dataset = shards(source, tmp_path / "out")
    assert summary == {"samples": 5, "classes": ["cat", "dog"], "shards": 1, "unreadable": []}
    assert held(dataset) == {
        body: name.split("/")[0] if "/" in name else None for name, body in files.items() if not name.startswith(".")
    }
    assert inspect(tmp_path / "out")["unlabelled"] == 1


def test_labels_come_from_a_table(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = fill(source, "a/1.png", "a/2.png", "b/3.png", "4.png")
    table = tmp_path / "labels.csv"
    table.write_text('\ufefffile,label,other\na/1.png,10,x\nb/3.png,9,\n./4.png,"10",\n', encoding="utf-8")
    summary, dataset = shards(source, tmp_path / "out", labels=table)
    assert summary["classes"] == ["9", "10"]  # numbers in their own order
    assert held(dataset) == {files["a/1.png"]: "10", files["b/3.png"]: "9", files["4.png"]: "10"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,label\na/1.png,x\na/9.png,x\n", r"labels\.csv, line 3: 'a/9\.png' is no file below"),
        ("file,label\n../secret.png,x\n", r"line 2: '\.\./secret\.png' is no file below"),
        ("file,label\n/etc/hostname,x\n", "line 2"),
        ("file,label\na,x\n", "line 2: 'a' is no file"),
        ("file,label\n,x\n", "line 2"),
        ("file,label\na/1.png,\n", "has no label"),
        ("file,label\na/1.png\n", "has no label"),
        ("file,label\na/1.png,x\na/1.png,y\n", "same file twice"),
        ("file,label\na/1.png,x\na/./1.png,y\n", "same file twice"),
        ("file,label\na/notes.txt,x\n", "'a/notes.txt' is no picture"),
        ("name,class\na/1.png,x\n", "columns 'file' and 'label'"),
        ("file,label\n", "columns 'file' and 'label'"),
        ("", "columns 'file' and 'label'"),
        (None, "cannot read the labels"),
    ],
)
def test_wrong_tables_are_one_sentence(tmp_path: Path, table: str | None, message: str) -> None:
    fill(tmp_path / "source", "a/1.png")
    fill(tmp_path, "secret.png")
    (tmp_path / "source" / "a" / "notes.txt").write_text("text")
    path = tmp_path / "labels.csv"
    if table is not None:
        path.write_text(table)
    with pytest.raises(UserError, match=message) as caught:
        shard_images(tmp_path / "source", tmp_path / "out", Choices(labels=path), progress=False)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_names_that_make_the_same_key_are_told_apart(tmp_path: Path) -> None:
    names = ["c/a.png", "c/a.jpg", "c/a.jpeg", "c/a_jpg.png", "c/v1.2.png", "c/v1_2.png", "c/v1.2.jpg", "c.d/a.png"]
    names += ["c/line\nbreak.png", "c/" + "long" * 60 + ".png", "ж/東京.png"]
    files = fill(tmp_path / "source", *names)
    _, dataset = shards(tmp_path / "source", tmp_path / "out")
    keys = [dataset.key(identity) for identity in range(len(dataset))]
    assert len(set(keys)) == len(names)
    assert not any("." in key.rsplit("/", 1)[-1] or "\n" in key for key in keys)
    assert held(dataset) == {body: name.split("/")[0] for name, body in files.items()}


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    try:
        files = fill(tmp_path / "source", f"{name}/{name}.png", "plain/1.png")
    except OSError:
        pytest.skip("this file system refuses such names")
    (tmp_path / "source" / name / f"{name}2.png").write_bytes(b"broken")
    summary, dataset = shards(tmp_path / "source", tmp_path / "out")
    assert sorted(held(dataset)) == sorted(files.values())
    for text in (*summary["classes"], *(file for file, _ in summary["unreadable"])):
        text.encode()  # can be printed


def test_unreadable_files_are_listed_and_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = fill(source, *(f"c/{n}.{e}" for n in range(20) for e in ("png", "jpg")))
    (source / "c" / "text.png").write_text("hello")
    (source / "c" / "cut.jpg").write_bytes(picture(0, 50, 50, "JPEG")[:-200])
    (source / "c" / "nothing.png").write_bytes(b"")
    (source / "c" / "broken link.png").symlink_to(source / "nowhere.png")
    summary, dataset = shards(source, tmp_path / "out", samples_per_shard=9)
    reasons = dict(summary["unreadable"])
    assert set(reasons) == {"c/text.png", "c/cut.jpg", "c/nothing.png", "c/broken link.png"}
    assert reasons["c/text.png"] == "not a picture"
    assert "truncated" in reasons["c/cut.jpg"]
    assert "No such file" in reasons["c/broken link.png"]
    assert held(dataset) == dict.fromkeys(files.values(), "c")
    assert (summary["samples"], summary["shards"]) == (40, 5)  # of 44 files in nines, four of them unreadable
    assert all(5 <= count <= 9 for count in dataset.counts.tolist())


def test_nothing_usable_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(UserError, match="holds no pictures"):
        shard_images(source, tmp_path / "out", progress=False)
    (source / "broken.png").write_bytes(b"?")
    with pytest.raises(UserError, match="no usable sample"):
        shard_images(source, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="is not a folder"):
        shard_images(source / "broken.png", tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="at least 1"):
        shard_images(source, tmp_path / "out", Choices(samples_per_shard=0), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    fill(source, "a/1.png")
    with pytest.raises(UserError, match="already exists"):
        shard_images(source, source, progress=False)
    with pytest.raises(UserError, match="no dataset"):
        shard_images(source, source, overwrite=True, progress=False)
    assert (source / "a" / "1.png").exists()
    shards(source, tmp_path / "out")
    fill(source, "a/1.png", "a/2.png")
    with pytest.raises(UserError, match="already exists"):
        shard_images(source, tmp_path / "out", progress=False)
    assert len(shards(source, tmp_path / "out", overwrite=True)[1]) == 2


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    files = fill(elsewhere, "1.png", "2.png")
    source.mkdir()
    (source / "class").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(source)
    assert held(shards(source, tmp_path / "out")[1]) == dict.fromkeys(files.values(), "class")


def test_class_sorted_folders_do_not_make_class_sorted_shards(tmp_path: Path) -> None:
    fill(tmp_path / "source", *(f"{c}/{n:03d}.png" for c in "abcd" for n in range(50)))
    _, dataset = shards(tmp_path / "source", tmp_path / "out", samples_per_shard=50)
    for shard in dataset.labels().reshape(4, 50):
        assert min(Counter(shard.tolist()).values()) >= 4
        assert len(Counter(shard.tolist())) == 4


def test_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "source", *(f"c/{n}.png" for n in range(60)))
    calls = []

    def interrupted(payload: bytes) -> None:
        calls.append(payload)
        if len(calls) == 30:
            raise KeyboardInterrupt

    monkeypatch.setattr("data.reencode.verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shard_images(tmp_path / "source", tmp_path / "out", Choices(samples_per_shard=5), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_cifar_pictures(cifar_folder: Path, tmp_path: Path) -> None:
    """Real JPEGs: complete, labelled, decodable, and byte for byte the same on a second writing."""
    summary, dataset = shards(cifar_folder, tmp_path / "one", samples_per_shard=64)
    again = tmp_path / "two"
    shards(cifar_folder, again, samples_per_shard=64)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    assert (summary["samples"], summary["unreadable"]) == (300, [])
    assert summary["classes"] == sorted(path.name for path in cifar_folder.iterdir())
    expected = {path.read_bytes(): path.parent.name for path in cifar_folder.rglob("*.jpg")}
    assert held(dataset) == expected
    batch = next(sequential(dataset, 300, canvas=32))
    assert batch.images.shape == (300, 3, 32, 32)
    assert (batch.sizes == 32).all()
    assert np.bincount(batch.labels.numpy()).tolist() == [30] * 10
    assert 80 < batch.images.float().mean() < 160
    assert inspect(tmp_path / "one")["problems"] == []
