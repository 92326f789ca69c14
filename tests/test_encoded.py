"""Laws of the bytes below the loader: the same samples, whoever reads them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import picture

from data.dataset import ShardedDataset
from data.encoded import EncodedLoader
from data.errors import DamagedData, UserError
from data.loader import Loader
from data.shards import DatasetWriter


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_bytes_are_those_of_the_samples_that_a_loader_decodes(picture_shards: Path, workers: int) -> None:
    dataset = ShardedDataset(picture_shards)
    arguments = {"seed": 3, "rank": 1, "world_size": 2, "start": 24, "lanes": 2}
    loader = EncodedLoader(dataset, 12, workers=workers, **arguments)
    for batch, decoded in zip(islice(loader, 9), Loader(dataset, 12, canvas=8, **arguments), strict=False):
        assert batch.ids.tolist() == decoded.ids.tolist()
        assert batch.keys.tolist() == decoded.keys.tolist()
        assert batch.labels.tolist() == decoded.labels.tolist() == [number % 3 for number in batch.ids]
        assert batch.payloads == [picture(number, 5 + number % 4, 5 + number % 3) for number in batch.ids.tolist()]
    assert loader.position == 24 + 9 * 12
    assert (
        next(iter(loader)).ids.tolist()
        == next(iter(EncodedLoader(dataset, 12, **arguments | {"start": 132}))).ids.tolist()
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_told_from_any_thread(tmp_path: Path, workers: int) -> None:
    with DatasetWriter(tmp_path / "out", "images", 5) as writer:
        for number in range(10):
            writer.add(f"{number}", {"png": picture(number)})
    tar = tmp_path / "out" / "shard-000001.tar"
    raw = bytearray(tar.read_bytes())
    raw[700] ^= 1
    tar.write_bytes(raw)
    with pytest.raises(DamagedData, match="does not match its index"):
        list(islice(EncodedLoader(ShardedDataset(tmp_path / "out"), 5, workers=workers), 2))


def test_few_files_and_indexes_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many shards there are; forgetting changes nothing in what is read."""
    with DatasetWriter(tmp_path / "out", "images", 2) as writer:
        for number in range(60):
            writer.add(f"{number}", {"png": picture(number, 2, 2)})
    dataset = ShardedDataset(tmp_path / "out")
    monkeypatch.setattr("data.reader.INDEXED_SAMPLES", 10)
    monkeypatch.setattr(dataset.storage, "most_open", 3, raising=False)
    for batch in islice(EncodedLoader(dataset, 20), 9):
        assert batch.payloads == [picture(number, 2, 2) for number in batch.ids.tolist()]
        assert len(dataset.reader._files) <= 3
        assert sum(len(places.table) for places in dataset.reader._places.values()) <= 10
    dataset.reader.close()
    assert dataset.image(5)[0] == picture(5, 2, 2)


def test_an_index_entry_takes_32_bytes(picture_shards: Path) -> None:
    dataset = ShardedDataset(picture_shards)
    dataset.pictures(np.arange(50))
    assert sum(places.table.nbytes for places in dataset.reader._places.values()) == 32 * 50


def test_text_is_read_in_rows(tmp_path: Path) -> None:
    from data.text import shard_text

    (tmp_path / "a.txt").write_text("words " * 200)
    shard_text([tmp_path / "a.txt"], tmp_path / "out", vocab_size=270, validation=0, progress=False)
    with pytest.raises(UserError, match="use a Loader"):
        EncodedLoader(ShardedDataset(tmp_path / "out", context=4), 2)
