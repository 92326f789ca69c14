"""A tar kept open reads the same bytes mapped and unmapped, and a file that is cut short ends no process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data.open_shard import OpenShard


def opened(path: Path) -> OpenShard:
    return OpenShard(os.open(path, os.O_RDONLY))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(np.random.Generator(np.random.Philox(1)).bytes(300_000))
    return path


def test_mapped_and_read_bytes_are_equal(file: Path) -> None:
    shard, whole = opened(file), file.read_bytes()
    offsets, sizes = [0, 299_990, 4096, 100], [10, 10, 100_000, 0]
    wanted = [whole[o : o + n] for o, n in zip(offsets, sizes, strict=True)]
    assert shard.read(offsets, sizes) == wanted
    assert shard.read(offsets, sizes, cold=True) == wanted
    shard.close()
    shard.close()


def test_beyond_the_end_is_short(file: Path) -> None:
    shard = opened(file)
    assert [len(piece) for piece in shard.read([299_000, 400_000], [2_000, 5])] == [1_000, 0]


def test_a_file_cut_short_while_it_is_open_is_short(file: Path) -> None:
    shard = opened(file)
    assert len(shard.read([200_000], [100])[0]) == 100
    os.truncate(file, 4096)
    assert [len(piece) for piece in shard.read([0, 200_000], [4096, 100])] == [4096, 0]


def test_an_empty_file_has_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty.tar"
    path.touch()
    assert opened(path).read([0], [10]) == [b""]


def test_pages_are_handed_back(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.open_shard._KEPT_BYTES", 100_000)
    shard, whole = opened(file), file.read_bytes()
    for _ in range(3):
        assert shard.read([0], [300_000]) == [whole]
    assert shard._touched == 0
