"""Samples that are there more than once, by their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data.dataset import ShardedDataset

_AT_ONCE = 256


def duplicates(dataset: ShardedDataset) -> int:
    """Pictures, or documents of a text, that repeat an earlier one exactly.

    Reads what has to be read: all of a text; of pictures with checksums only those whose size and CRC-32 occur
    twice. Memory: 16 bytes a sample or document.

    Raises:
        DamagedData: something cannot be read.
    """
    hashes = _documents(dataset) if dataset.kind == "text" else _pictures(dataset)
    found = np.fromiter(hashes, dtype=np.uint64)
    return len(found) - len(np.unique(found))


def _hash(payload: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(payload, digest_size=8).digest(), "little")


def _pictures(dataset: ShardedDataset) -> Iterator[int]:
    ids = dataset.all_ids()
    marks = _marks(dataset)
    if marks is not None:
        _, which, counts = np.unique(marks, return_inverse=True, return_counts=True)
        ids = ids[counts[which] > 1]
    for first in range(0, len(ids), _AT_ONCE):
        payloads, _ = dataset.pictures(ids[first : first + _AT_ONCE])
        yield from map(_hash, payloads)


def _marks(dataset: ShardedDataset) -> NDArray[np.uint64] | None:
    """Size and checksum of every picture in one number, None for tars without checksums."""
    found = []
    for shard in range(len(dataset.sizes)):
        places = dataset.storage.index(shard).places(dataset.reader.wanted)
        if not places.checked:
            return None
        found.append((places.table[:, 1].astype(np.uint64) << np.uint64(32)) | places.table[:, 2].astype(np.uint64))
    return np.concatenate(found)


def _documents(dataset: ShardedDataset) -> Iterator[int]:
    """A hash of each document's tokens; documents go on from block to block and from shard to shard."""
    bos, state, begun = dataset.manifest["bos"], hashlib.blake2b(digest_size=8), False
    for tokens in dataset.blocks():
        starts = np.flatnonzero(tokens == bos)
        for piece, start in zip(np.split(tokens, starts), [-1, *starts.tolist()], strict=True):
            if start >= 0:
                if begun:
                    yield int.from_bytes(state.digest(), "little")
                state, begun = hashlib.blake2b(digest_size=8), True
            state.update(piece.tobytes())
    if begun:
        yield int.from_bytes(state.digest(), "little")
