"""Bytes of samples, out of the tars of one dataset."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from data.errors import DamagedData
from data.index import Places, ShardIndex
from data.open_shard import OpenShard
from data.storage import Storage

Ints = NDArray[np.int64]
INDEXED_SAMPLES = 2**22
"""Most samples whose places one reader remembers (32 bytes each, so 128 MiB); the shard in use always counts."""
_WHOLE_INDEXES = 4
_SLOW = 2e-4
"""Seconds a sample, beyond what copying takes, from which on the storage is taken to be cold."""
_COPYING = 2e-9
"""Seconds a byte."""


class ShardReader:
    """Reads one part (a picture, a block of tokens) of samples named by shard and member.

    Indexes are loaded when a sample of their shard is first read, and the least recently used ones are
    forgotten; so are open files. Not for several threads at once: each takes a `copy`.
    """

    def __init__(self, storage: Storage, wanted: Sequence[str]) -> None:
        """`wanted` are the extensions of the part to read, any of which will do."""
        self.storage, self.wanted = storage, wanted
        self._places: OrderedDict[int, Places] = OrderedDict()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._files: OrderedDict[int, OpenShard] = OrderedDict()
        self._remembered = 0
        self._cold = False
        """Whether the last reads waited for the storage: then all of the next are asked for before the first."""

    def copy(self) -> ShardReader:
        """A reader of the same shards that shares nothing which changes."""
        return ShardReader(self.storage, self.wanted)

    def read(self, shards: Ints, members: Ints) -> tuple[list[bytes], Ints]:
        """The parts' bytes, checked against their index, and the samples' labels: int64 (n,).

        Raises:
            DamagedData: a sample has no such part, its shard cannot be read, or is not what was indexed.
        """
        payloads: list[bytes] = [b""] * len(shards)
        labels = np.empty(len(shards), dtype=np.int64)
        for shard, here in _grouped(shards):
            places = self.places(shard)
            table = places.table[members[here]]
            labels[here] = table[:, 3]
            file = self._file(shard)
            try:
                if self._cold and len(table) > 1:
                    _announce(file.descriptor, table)
                began = time.perf_counter()
                found = _read(file, table, places.checked, self._cold)
                seconds = time.perf_counter() - began
                self._cold = seconds > _SLOW * len(table) + _COPYING * max(0, int(table[:, 1].sum()))
            except OSError as error:
                raise DamagedData(f"cannot read {self.storage.names[shard]}: {error.strerror}") from None
            if isinstance(found, int):
                raise DamagedData(self._complaint(shard, int(members[here][found]), table[found, 1]))
            if not places.checked:
                self.storage.check(shard, file.descriptor)
            for place, payload in zip(here.tolist(), found, strict=True):
                payloads[place] = payload
        return payloads, labels

    def places(self, shard: int) -> Places:
        """Where the samples of a shard lie."""
        if shard in self._places:
            self._places.move_to_end(shard)
            return self._places[shard]
        places = self._places[shard] = self.storage.index(shard).places(self.wanted)
        self._remembered += len(places.table)
        while self._remembered > INDEXED_SAMPLES and len(self._places) > 1:
            self._remembered -= len(self._places.popitem(last=False)[1].table)
        return places

    def index(self, shard: int) -> ShardIndex:
        """The whole index of a shard, with the samples' keys."""
        if shard not in self._indexes:
            self._indexes[shard] = self.storage.index(shard)
            if len(self._indexes) > _WHOLE_INDEXES:
                self._indexes.popitem(last=False)
        return self._indexes[shard]

    def close(self) -> None:
        """Close the open files; reading opens them again."""
        while self._files:
            self._files.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        # Open files and what was read of indexes stay behind when a worker process gets its copy.
        empty = {"_files": OrderedDict(), "_places": OrderedDict(), "_indexes": OrderedDict(), "_remembered": 0}
        return self.__dict__ | empty

    def __del__(self) -> None:
        if "_files" in self.__dict__:
            self.close()

    def _file(self, shard: int) -> OpenShard:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        self._files[shard] = OpenShard(self.storage.open(shard))
        if len(self._files) > self.storage.most_open:
            self._files.popitem(last=False)[1].close()
        return self._files[shard]

    def _complaint(self, shard: int, member: int, size: int) -> str:
        index, tar = self.index(shard), self.storage.names[shard]
        if size < 0:
            kind = "picture" if "jpg" in self.wanted else f"part named {' or '.join(self.wanted)}"
            return f"sample {index.key(member)!r} in {tar} holds no {kind} ({index.parts})"
        return (
            f"{tar} has changed or is damaged: sample {index.key(member)!r} does not match "
            "its index; run `headwater inspect` and restore the shard"
        )


def _grouped(shards: Ints) -> Iterator[tuple[int, Ints]]:
    """Each shard and where it stands in `shards`."""
    order = np.argsort(shards, kind="stable")
    ordered = shards[order]
    cuts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    for here in np.split(order, cuts) if len(order) else ():
        yield int(shards[here[0]]), here


def _read(file: OpenShard, table: Ints, checked: bool, cold: bool) -> list[bytes] | int:
    """The bytes at each row's offset, or the number of the first row whose bytes are not there."""
    offsets, sizes, sums, _ = table.T.tolist()
    if len(table) and min(sizes) < 0:
        return sizes.index(min(sizes))
    payloads = file.read(offsets, sizes, cold)
    found = [isal_zlib.crc32(payload) for payload in payloads] if checked else [len(payload) for payload in payloads]
    right = sums if checked else sizes
    if found != right:
        return [one != other for one, other in zip(found, right, strict=True)].index(True)
    return payloads


def _announce(descriptor: int, table: Ints) -> None:
    """Let the storage fetch all of these at once, not one after the other."""
    for offset, size in table[:, :2].tolist():
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
