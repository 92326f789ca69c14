"""Laws of shards written by us: readable by plain WebDataset, the same bytes twice, whole or absent, never stale."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import REPOSITORY, picture, write_pictures
from PIL import Image

from data.dataset import ShardedDataset
from data.errors import UserError
from data.foreign import foreign_index
from data.index import load_index
from data.inspect import inspect
from data.shards import DatasetWriter, fingerprint
from data.tar import members


@pytest.fixture
def copy(picture_shards: Path, tmp_path: Path) -> Path:
    """A dataset that a test may damage."""
    return Path(shutil.copytree(picture_shards, tmp_path / "copy"))


def flip(path: Path, offset: int) -> None:
    """Invert one byte, keeping size and modification time."""
    stat = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_plain_webdataset_reads_what_we_write(picture_shards: Path) -> None:
    tars = [str(path) for path in sorted(picture_shards.glob("*.tar"))]
    assert len(tars) == 8
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"c/{number:05d}" for number in range(50)]
    for number, sample in enumerate(samples):
        expected = np.asarray(Image.open(io.BytesIO(picture(number, 5 + number % 4, 5 + number % 3))))
        assert np.array_equal(sample["png"], expected)


def test_a_second_writing_gives_the_same_bytes(picture_shards: Path, tmp_path: Path) -> None:
    again = write_pictures(tmp_path / "elsewhere", 50, 7)
    assert contents(again) == contents(picture_shards)


def test_every_part_of_every_sample_lies_where_the_index_says(tmp_path: Path) -> None:
    long = "deep/" * 40 + "x" * 120  # beyond ustar's 255 bytes
    keys = ["plain", "日本/ж", long, "a.b/c", "space and 'quote'", "raw \udcff byte"]
    parts = {"png": picture(1), "seg.png": picture(2), "json": b"{}", "empty": b""}
    with DatasetWriter(tmp_path / "out", "images", 4) as writer:
        for number, key in enumerate(keys):
            writer.add(key, parts if number % 2 else {"png": picture(number)}, label=number)
    dataset = ShardedDataset(tmp_path / "out")
    assert [dataset.key(identity) for identity in range(len(keys))] == keys
    for tar in dataset.paths:
        index, raw = load_index(tar.with_suffix(".index")), tar.read_bytes()
        walked = {member.name: raw[member.offset : member.offset + member.size] for member in members(tar)}
        listed = {
            f"{key}.{part}": raw[index.offsets[n, p] : index.offsets[n, p] + index.sizes[n, p]]
            for n, key in enumerate(index.keys)
            for p, part in enumerate(index.parts)
            if index.sizes[n, p] >= 0
        }
        assert walked == listed
    assert dataset.image(1) == (picture(1), 1)
    assert dataset.image(4) == (picture(4), 4)


@pytest.mark.parametrize("key", ["", "a.b", "x/a.b", "a\nb"])
def test_keys_that_webdataset_would_misread_are_refused(tmp_path: Path, key: str) -> None:
    with DatasetWriter(tmp_path / "out", "images", 4) as writer:
        with pytest.raises(ValueError, match="key"):
            writer.add(key, {"png": b""})
        writer.add("fine", {"png": b""})
        with pytest.raises(ValueError, match="twice"):
            writer.add("fine", {"jpg": b""})


def test_an_exception_inside_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with DatasetWriter(tmp_path / "out", "images", 2) as writer:
            for number in range(5):
                writer.add(f"{number}", {"png": picture(number)})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="nothing to write"), DatasetWriter(tmp_path / "out", "images", 2):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_failing_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        write_pictures(tmp_path / "out", 5, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_no_dataset_and_the_next_one_clears_up(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        from data.shards import DatasetWriter
        with DatasetWriter(Path(sys.argv[1]), "images", 2) as writer:
            for number in range(5):
                writer.add(str(number), {"png": b"bytes"})
            print("inside", flush=True)
            time.sleep(60)
    """
    out = tmp_path / "out"
    command = [sys.executable, "-c", textwrap.dedent(script), str(out)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "inside\n"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1  # the hidden folder, half full
    write_pictures(out, 10, 5)
    assert len(ShardedDataset(out)) == 10
    assert list(tmp_path.iterdir()) == [out]


def test_another_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "out", "images", 2) as writer:
        writer.add("a", {"png": picture(0)})
        # As a process that lives would leave it (process 1 always does).
        other = writer.folder.with_name(writer.folder.name.replace(f".{os.getpid()}.", ".1."))
        other.mkdir()
    with DatasetWriter(tmp_path / "out", "images", 2, overwrite=True) as writer:
        writer.add("a", {"png": picture(0)})
    assert sorted(tmp_path.iterdir()) == [other, tmp_path / "out"]


def test_only_datasets_are_overwritten(tmp_path: Path) -> None:
    out = write_pictures(tmp_path / "out", 10, 5)
    before = contents(out)
    with pytest.raises(UserError, match="already exists"):
        write_pictures(out, 3, 5)
    with suppress(RuntimeError), DatasetWriter(out, "images", 5, overwrite=True) as writer:
        writer.add("a", {"png": picture(0)})
        raise RuntimeError
    assert contents(out) == before  # the old one stands until the new one is whole
    with DatasetWriter(out, "images", 5, overwrite=True) as writer:
        writer.add("a", {"png": picture(0)})
    assert len(ShardedDataset(out)) == 1
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "only copy.png").write_bytes(picture(0))
    for taken in (photos, photos / "only copy.png"):
        with pytest.raises(UserError, match="no dataset"):
            DatasetWriter(taken, "images", 5, overwrite=True)
    assert (photos / "only copy.png").read_bytes() == picture(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]
    with pytest.raises(UserError, match="at least 1"):
        DatasetWriter(tmp_path / "new", "images", 0)


def test_a_flipped_byte_is_found_when_it_is_read(copy: Path) -> None:
    dataset = ShardedDataset(copy)
    index = load_index(copy / "shard-000002.index")
    flip(copy / "shard-000002.tar", int(index.offsets[3, 0] + index.sizes[3, 0] // 2))
    damaged = 2 * 7 + 3
    for identity in range(50):
        if identity != damaged:
            dataset.image(identity)
    with pytest.raises(UserError, match=r"shard-000002\.tar has changed or is damaged: sample 'c/00017'"):
        dataset.image(damaged)


@pytest.mark.parametrize("change", ["append", "truncate"])
def test_another_size_is_found_when_it_is_opened(copy: Path, change: str) -> None:
    tar = copy / "shard-000003.tar"
    payload = tar.read_bytes()
    tar.write_bytes(payload + bytes(512) if change == "append" else payload[:-512])
    with pytest.raises(UserError, match=r"shard-000003\.tar has \d+ bytes, but \d+ when it was indexed"):
        ShardedDataset(copy)


def test_a_shard_that_vanishes_while_open(copy: Path) -> None:
    dataset = ShardedDataset(copy)
    (copy / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        dataset.image(8)


def test_missing_things_are_named(copy: Path, tmp_path: Path) -> None:
    dataset = ShardedDataset(copy)
    (copy / "shard-000001.index").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.index is missing"):
        dataset.image(7)
    (copy / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar is named in dataset\.json but missing"):
        ShardedDataset(copy)
    (tmp_path / "empty").mkdir()
    for source, message in [(tmp_path / "empty", "neither"), (tmp_path / "no", "does not exist"), ([], "no shards")]:
        with pytest.raises(UserError, match=message):
            ShardedDataset(source)
    with pytest.raises(UserError, match="holds images, where text"):
        ShardedDataset(write_pictures(tmp_path / "p", 2, 2), kind="text")


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"format": 1}', '{"format": 1, "kind": "images"}', "\xff"])
def test_a_damaged_manifest_is_one_sentence(copy: Path, damage: str) -> None:
    (copy / "dataset.json").write_bytes(damage.encode("latin-1"))
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        ShardedDataset(copy)


@pytest.mark.parametrize("field", ["kind", "fingerprint", "shards", "name", "samples", "bytes"])
def test_a_manifest_without_a_field_says_which(copy: Path, field: str) -> None:
    manifest = json.loads((copy / "dataset.json").read_text())
    for found in (manifest, manifest["shards"][0]):
        found.pop(field, None)
    (copy / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=field):
        ShardedDataset(copy)


def test_damaged_or_exchanged_indexes_are_refused(copy: Path) -> None:
    index = copy / "shard-000001.index"
    whole = index.read_bytes()
    for damage in (b"", whole[:40], whole[:-5], bytes(len(whole))):
        index.write_bytes(damage)
        with pytest.raises(UserError, match=r"shard-000001\.index is damaged"):
            ShardedDataset(copy).image(7)
    shutil.copy(copy / "shard-000007.index", index)  # of a shard with one sample
    with pytest.raises(UserError, match=r"shard-000001\.index is damaged or another shard's"):
        ShardedDataset(copy).image(7)


def test_inspect_finds_one_flipped_byte_anywhere(copy: Path) -> None:
    report = inspect(copy)
    assert report["problems"] == []
    assert (report["samples"], report["shards"]) == (50, 8)
    assert report["labels"] == {"class 0": 17, "class 1": 17, "class 2": 16}
    assert report["pictures"]["looked_at"] == 50
    flip(copy / "shard-000004.tar", 130)  # in a header, which no reader of samples meets
    assert inspect(copy, verify=False)["problems"] == []
    assert [p.split("/")[-1].split(" ")[0] for p in inspect(copy)["problems"]] == ["shard-000004.tar"]
    index = copy / "shard-000005.index"
    flip(index, index.stat().st_size - 1)
    problems = inspect(copy)["problems"]
    assert len(problems) == 3
    assert "shard-000005.index is damaged" in problems[0]
    assert "shard-000005.index does not match" in problems[2]


def test_the_fingerprint_says_what_a_dataset_is_not_where(picture_shards: Path, copy: Path, tmp_path: Path) -> None:
    one = ShardedDataset(picture_shards).fingerprint
    assert ShardedDataset(copy).fingerprint == one
    assert ShardedDataset(write_pictures(tmp_path / "fewer", 49, 7)).fingerprint != one
    assert ShardedDataset(write_pictures(tmp_path / "cut", 50, 8)).fingerprint != one
    assert ShardedDataset(write_pictures(tmp_path / "classes", 50, 7, classes=4)).fingerprint != one
    facts = [{"name": "a.tar", "samples": 1, "bytes": 10, "sha256": "x"}]
    assert fingerprint(facts, {"kind": "images"}) != fingerprint(facts, {"kind": "text"})


def test_a_dataset_survives_being_sent_to_a_worker(picture_shards: Path) -> None:
    import pickle

    dataset = ShardedDataset(picture_shards)
    dataset.image(3)
    assert pickle.loads(pickle.dumps(dataset)).image(3) == dataset.image(3)


def test_an_index_beside_a_foreign_tar_is_made_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = copy / "shard-000000.tar"
    made = foreign_index(tar)
    monkeypatch.setattr("data.foreign.index_tar", None)  # would fail if it were walked again
    again = foreign_index(tar)
    assert (again.keys, again.tar_bytes) == (made.keys, made.tar_bytes)
    monkeypatch.undo()
    time.sleep(0.01)
    write_pictures(copy / "new", 3, 3)
    os.replace(copy / "new" / "shard-000000.tar", tar)
    assert len(foreign_index(tar)) == 3
