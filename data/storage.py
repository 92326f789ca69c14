"""Where the shards of a dataset lie, and how a reader gets hold of one.

`ShardedDataset` reads through this alone: it asks for an index, opens a shard, and says what it will read
next. Local files need no more than that; remote ones (`data.remote`) are brought into a cache first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from data.errors import DamagedData, UserError
from data.files import sha256
from data.foreign import foreign_index
from data.index import ShardIndex, load_index


class Storage(Protocol):
    """The shards of one dataset, by number; picklable, and usable after a fork."""

    names: list[Any]
    """What to call each shard in a sentence: its path or URL."""
    folder: Path
    """A local folder with the dataset's side files (manifest, tokenizer), or where its tars lie."""
    most_open: int
    """Most shards that one process should keep open; the least recently used is closed first."""
    most_bytes: int | None
    """Most bytes of shards that can be at hand at a time, None where all of them are."""

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard; raises `DamagedData` when it is missing, damaged, or of another tar."""

    def open(self, shard: int) -> int:
        """A descriptor of the whole tar, read only, to be closed by the caller; waits while it is downloaded.

        Raises `DamagedData` when the tar is missing, cannot be fetched, or has changed since it was indexed."""

    def ahead(self, shards: Sequence[int]) -> None:
        """Say which shards are read next, soonest first; replaces what was said before, returns at once."""

    def check(self, shard: int, descriptor: int) -> None:
        """Raises `DamagedData` when the tar behind an open descriptor is no longer the one that was indexed.

        For tars without checksums (made elsewhere), whose bytes nothing else vouches for."""

    def verify(self, shard: int) -> list[str]:
        """What is wrong with a shard's tar and index as whole files, by the manifest's checksums."""


class LocalStorage:
    """Tars in folders of this machine (or of a file system that looks like one)."""

    most_open = 64
    most_bytes: int | None = None

    def __init__(self, paths: list[Path], shards: list[dict[str, Any]], foreign: bool) -> None:
        """`shards` are the manifest's entries, in the order of `paths`."""
        self.names, self.folder, self.foreign = paths, paths[0].parent, foreign
        self._shards = shards
        self._stamps: dict[int, tuple[int, int]] = {}

    def index(self, shard: int) -> ShardIndex:
        """See `Storage`."""
        path, described = self.names[shard], self._shards[shard]
        if not path.is_file():
            raise DamagedData(f"{path} is missing; restore it, or write the dataset again")
        stamp = _stamp(path.stat())
        try:
            index = foreign_index(path) if self.foreign else our_index(path.with_suffix(".index"), described)
        except UserError as error:
            raise DamagedData(str(error)) from None
        if (
            index.tar_bytes != described["bytes"]
            or len(index) != described["samples"]
            or stamp[0] != described["bytes"]
        ):
            raise DamagedData(f"{path} has changed since it was indexed; restore it or write the dataset again")
        self._stamps.setdefault(shard, stamp)
        return index

    def open(self, shard: int) -> int:
        """See `Storage`."""
        path = self.names[shard]
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DamagedData(f"cannot read {path}: {error.strerror}; restore it, or write the dataset again") from None

    def ahead(self, shards: Sequence[int]) -> None:
        """Nothing: the operating system reads ahead."""

    def check(self, shard: int, descriptor: int) -> None:
        """See `Storage`: compares size and time of change with those at indexing."""
        if shard in self._stamps and _stamp(os.fstat(descriptor)) != self._stamps[shard]:
            raise DamagedData(f"{self.names[shard]} has changed since it was indexed; restore it or start again")

    def verify(self, shard: int) -> list[str]:
        """See `Storage`; of tars made elsewhere nothing is known."""
        tar, described = self.names[shard], self._shards[shard]
        wrong = []
        for file, name in ((tar, "sha256"), (tar.with_suffix(".index"), "index_sha256")):
            if name in described and _digest(file) != described[name]:
                wrong.append(f"{file} does not match its checksum; restore it or write the dataset again")
        return wrong


def _digest(path: Path) -> str | None:
    """SHA-256, None for a file that cannot be read."""
    try:
        return sha256(path)
    except OSError:
        return None


def our_index(path: Path, described: dict[str, Any]) -> ShardIndex:
    """Load the index that a manifest's entry describes; raises `UserError` when it is not the one written then.

    Nothing else vouches for its labels and keys. (Manifests of early versions hold no checksum.)
    """
    index = load_index(path)
    if described.get("index_sha256", "") not in ("", sha256(path)):
        raise UserError(f"{path} is damaged or another shard's; restore it or write the dataset again")
    return index


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns
