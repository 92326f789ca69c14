"""Laws of datasets kept in memory: the same batches as streamed ones, bit for bit, damage included."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_kit import recipe
from test_damage import spoil

import data.resident
from data.batch import ImageBatch
from data.dataset import ShardedDataset
from data.errors import DamagedData, UserError
from data.loader import Loader
from data.resident import Resident, ResidentLoader
from pretrain.loop import train
from pretrain.metrics import read_metrics


def same(ours: ImageBatch, theirs: ImageBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(vars(ours).values(), vars(theirs).values(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 12},
        {"batch_size": 12, "start": 36, "microbatch": 3},
        {"batch_size": 12, "rank": 1, "world_size": 2},
        {"batch_size": 12, "seed": 5, "lanes": 3},
    ],
)
@pytest.mark.parametrize("view", [False, True])
def test_resident_batches_are_the_streamed_ones(picture_shards: Path, settings: dict[str, Any], view: bool) -> None:
    dataset = ShardedDataset(picture_shards)
    dataset = dataset.split(0.3)[0] if view else dataset
    streamed = Loader(dataset, canvas=8, **settings)
    resident = ResidentLoader(Resident(dataset, 8, workers=1 if view else 0), **settings)
    assert resident.accumulation == streamed.accumulation
    for ours, theirs in islice(zip(resident, streamed, strict=False), 15):
        assert same(ours, theirs)
    assert resident.position == streamed.position
    again = ResidentLoader(Resident(dataset, 8), **{**settings, "start": streamed.position})
    assert same(next(iter(again)), next(iter(streamed)))


def test_damaged_samples_get_the_same_substitutes(picture_shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(picture_shards, tmp_path / "copy"))
    for sample in (15, 30):
        spoil(copy, sample)
    dataset = ShardedDataset(copy, tolerance=1000)
    streamed, resident = Loader(dataset, 12, canvas=8), ResidentLoader(Resident(dataset, 8), 12)
    for ours, theirs in islice(zip(resident, streamed, strict=False), 10):
        assert same(ours, theirs)
    assert resident.damaged == streamed.damaged > 0
    with pytest.raises(DamagedData, match=r"c/000(15|30)"):
        Resident(ShardedDataset(copy), 8)


def test_too_many_pictures_are_refused_before_they_are_read(
    picture_shards: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.resident, "_free_bytes", lambda device: 5000)
    with pytest.raises(UserError, match=r"50 pictures of 8 x 8 .*data\.resident=false"):
        Resident(ShardedDataset(picture_shards), 8)
    with pytest.raises(UserError, match=r"data\.resident"):
        Resident(ShardedDataset(sentences, context=8), 8)


def test_a_run_learns_the_same_from_memory(digits: Path, tmp_path: Path) -> None:
    losses = []
    for resident in (False, True):
        folder = tmp_path / str(resident)
        train(recipe("mae", digits / "train", {"train.steps": 4, "data.resident": resident}), folder)
        losses.append([line["loss"] for line in read_metrics(folder) if "loss" in line])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


@pytest.mark.gpu
def test_pictures_on_the_gpu_are_the_streamed_ones(picture_shards: Path) -> None:
    dataset = ShardedDataset(picture_shards)
    resident = ResidentLoader(Resident(dataset, 8, "cuda"), 12)
    for ours, theirs in islice(zip(resident, Loader(dataset, 12, canvas=8), strict=False), 8):
        assert ours.images.is_cuda
        assert same(ours.to("cpu"), theirs)
