"""Laws of damage: named and counted; within the tolerance replaced by a pure function of the key, beyond it the end."""

from __future__ import annotations

import io
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture, write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pretrain_kit import recipe

from data.damage import candidates
from data.dataset import ShardedDataset
from data.errors import DamagedData, UserError
from data.index import load_index
from data.inspect import inspect
from data.loader import Loader, sequential
from data.shards import DatasetWriter
from pretrain.loop import train
from pretrain.metrics import read_metrics


@pytest.fixture
def copy(picture_shards: Path, tmp_path: Path) -> Path:
    """50 pictures in shards of 7, which a test may damage."""
    return Path(shutil.copytree(picture_shards, tmp_path / "copy"))


def spoil(folder: Path, sample: int) -> None:
    """Invert a byte in the middle of one sample, keeping the file's size."""
    tar, member = folder / f"shard-{sample // 7:06d}.tar", sample % 7
    index = load_index(tar.with_suffix(".index"))
    with open(tar, "r+b") as file:
        file.seek(int(index.offsets[member, 0]) + 20)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 255]))


def rows(batches: list[Any]) -> list[tuple[int, int, int, bytes]]:
    """(id, key, label, pixels) of each sample."""
    return [
        (int(b.ids[i]), int(b.keys[i]), int(b.labels[i]), b.images[i].numpy().tobytes())
        for b in batches
        for i in range(len(b))
    ]


def read(source: Path, count: int, **arguments: Any) -> tuple[list[Any], Loader]:
    loader = Loader(ShardedDataset(source, tolerance=1000), seed=3, canvas=8, **arguments)
    return rows(list(islice(loader, count))), loader


@pytest.mark.parametrize("damage", ["bytes", "truncated", "missing", "index"])
def test_substitutes_are_the_same_on_any_ranks_and_workers(picture_shards: Path, copy: Path, damage: str) -> None:
    """Also the count; and whatever is not damaged stays as it was."""
    tar = copy / "shard-000002.tar"
    if damage == "bytes":
        bad = {15, 30}
        for sample in bad:
            spoil(copy, sample)
    elif damage == "truncated":  # between two members: the first three are whole
        os.truncate(tar, int(load_index(tar.with_suffix(".index")).offsets[3, 0]) - 512)
        bad = set(range(14, 21))
    else:
        (tar if damage == "missing" else tar.with_suffix(".index")).unlink()
        bad = set(range(14, 21))
    whole, _ = read(picture_shards, 10, batch_size=12)
    mended, loader = read(copy, 10, batch_size=12)
    assert loader.damaged == sum(row[0] in bad for row in whole) > 0
    for before, after in zip(whole, mended, strict=True):
        assert before[1] == after[1]  # the key of the position
        assert after[0] not in bad
        assert before[0] in bad or before == after
    again = [read(copy, 10, batch_size=12, rank=rank, world_size=2, workers=rank) for rank in range(2)]
    halves = [row for step in range(10) for ranks, _ in again for row in ranks[step * 6 : step * 6 + 6]]
    assert halves == mended
    assert sum(each.damaged for _, each in again) == loader.damaged
    count, reports = loader.take_damage()
    assert count == loader.damaged
    assert all("shard-00000" in sentence for sentence in reports)
    assert loader.take_damage() == (0, [])


def test_nothing_is_replaced_unless_it_was_asked_for(copy: Path) -> None:
    spoil(copy, 15)
    with pytest.raises(DamagedData, match=r"shard-000002\.tar has changed or is damaged: sample 'c/00015'"):
        list(sequential(ShardedDataset(copy), 8, canvas=8))
    assert len(rows(list(sequential(ShardedDataset(copy, tolerance=1), 8, canvas=8)))) == 50


def test_more_than_tolerated_ends_the_reading(copy: Path) -> None:
    for sample in (1, 9, 33):
        spoil(copy, sample)
    for workers in (0, 1):
        loader = Loader(ShardedDataset(copy, tolerance=2), batch_size=10, canvas=8, workers=workers)
        with pytest.raises(DamagedData, match=r"3 damaged samples are more than the 2 that are tolerated.*c/000"):
            list(islice(loader, 6))


def test_where_nothing_can_be_read_it_ends(copy: Path) -> None:
    loader = Loader(ShardedDataset(copy, tolerance=1000), batch_size=10, canvas=8)
    for tar in copy.glob("*.tar"):
        tar.unlink()
    with pytest.raises(DamagedData, match="nothing readable was found to take its place"):
        next(iter(loader))


@given(st.integers(0, 49), st.integers(-(2**63), 2**63 - 1), st.floats(0.1, 0.9))
@settings(max_examples=40, deadline=None)
def test_candidates_are_other_samples_of_the_same_view(
    picture_shards: Path, identity: int, key: int, share: float
) -> None:
    for view in ShardedDataset(picture_shards).split(share):
        found = list(candidates(view, identity, key))
        assert found == list(candidates(view, identity, key))
        assert identity not in found
        assert set(found) <= set(view.all_ids().tolist())
        assert found or len(view) == 1


def test_broken_pictures_and_bombs_are_damage(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (12_000, 10_000)).save(bomb, "PNG")
    jpeg = picture(1, 60, 60, "JPEG")
    bad = {"bomb": bomb.getvalue(), "cut": jpeg[: len(jpeg) // 2], "text": b"hello", "empty": b""}
    with DatasetWriter(tmp_path / "out", "images", 10) as writer:
        for name, payload in bad.items():
            writer.add(name, {"png": payload})
        for number in range(16):
            writer.add(f"fine{number}", {"png": picture(number)})
    for number, (name, reason) in enumerate(
        [("bomb", "12000x10000 pixels are more"), ("cut", "truncated"), ("text", "not a picture"), ("empty", "not a")]
    ):
        with pytest.raises(
            DamagedData, match=rf"picture '{name}' in .*shard-000000\.tar cannot be decoded: .*{reason}"
        ):
            next(sequential(ShardedDataset(tmp_path / "out"), 1, canvas=8, ids=np.array([number])))
    loader = Loader(ShardedDataset(tmp_path / "out", tolerance=4), batch_size=20, canvas=8)
    batch = next(iter(loader))
    assert loader.damaged == 4
    assert batch.ids.min() >= 4
    assert len(inspect(tmp_path / "out")["problems"]) == 4


def test_a_tar_replaced_under_a_reader_is_noticed(tmp_path: Path) -> None:
    """By its checksums where it is ours, by its size and time of change where it is not."""
    folder = write_pictures(tmp_path / "ours", 20, 10)
    foreign = tmp_path / "foreign.tar"
    shutil.copy(folder / "shard-000000.tar", foreign)
    ours, theirs = ShardedDataset(folder), ShardedDataset([foreign])
    assert ours.image(3)[0] == theirs.image(3)[0]
    raw = bytearray(foreign.read_bytes())
    index = load_index(folder / "shard-000000.index")
    for member in range(10):
        raw[index.offsets[member, 0] + 10] ^= 255
    for tar in (folder / "shard-000000.tar", foreign):
        with open(tar, "r+b") as file:  # in place, the size kept
            file.write(raw)
    for dataset in (ours, theirs):
        with pytest.raises(DamagedData, match="has changed"):
            dataset.image(3)


def test_a_run_counts_replaces_and_remembers(digits: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(digits / "train", tmp_path / "digits"))
    manifest = ShardedDataset(folder)
    tar = manifest.paths[0]
    with open(tar, "r+b") as file:
        file.seek(int(load_index(tar.with_suffix(".index")).offsets[5, 0]) + 8)
        file.write(b"damage")
    steps = {"train.batch_size": 128, "train.steps": 24, "data.damaged": 3}
    train(recipe("mae", folder, steps), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "damaged" in line]
    assert lines[-1]["damaged"] == 2  # once an epoch of 1,297
    with pytest.raises(UserError, match=r"cannot be|has changed or is damaged"):
        train(recipe("mae", folder, steps | {"data.damaged": 0}), tmp_path / "strict")
    with pytest.raises(DamagedData, match="2 damaged samples"):
        train(recipe("mae", folder, steps | {"data.damaged": 1}), tmp_path / "small budget")
