"""Random access to the samples of a dataset."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data.errors import DamagedData, UserError
from data.index import IMAGE_PARTS, ShardIndex, checksum
from data.keyed import hash_texts
from data.source import open_source

Ints = NDArray[np.int64]
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_SPLIT_SEED = 0x5B17


class ShardedDataset:
    """Random access to the samples of tar shards.

    `source` is a folder written by `headwater shard`, a folder or glob of WebDataset tars made elsewhere
    (indexed on first use), or a list of tars. `len()` counts samples: pictures, or for text the rows of
    `context + 1` tokens that start every `context` tokens within a shard (the tail of each shard that
    fills no row is not used).
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        *,
        context: int | None = None,
        kind: str | None = None,
        tolerance: int = 0,
    ) -> None:
        """Raises `UserError` when something is missing, damaged, of another `kind` than asked for, or has
        changed since it was indexed."""
        self.manifest, self.storage = open_source(source, tolerance > 0)
        self.tolerance = tolerance
        """Damaged samples that a loader may replace by others before it stops; see `data.damage`."""
        self.kind: str = self.manifest["kind"]
        if kind is not None and self.kind != kind:
            raise UserError(f"{source} holds {self.kind}, where {kind} should be; give another folder of shards")
        self.classes: list[str] = self.manifest.get("classes", [])
        self.fingerprint: str = self.manifest["fingerprint"]
        self.paths, self.folder = self.storage.names, self.storage.folder
        self.context = context
        if self.kind == "text" and (context is None or context < 1):
            raise UserError(f"{self.folder} holds text; give the number of tokens in a row (context), at least 1")
        self.sizes = self._sample_counts()
        """Samples of each shard, before any split."""
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        """The first sample id of each shard."""
        self._chosen: list[Ints] | None = None
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()

    @property
    def counts(self) -> Ints:
        """Samples of each shard that this view holds."""
        return self.sizes if self._chosen is None else np.array([len(c) for c in self._chosen], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def ids(self, shards: Ints, members: Ints) -> Ints:
        """Sample ids (the same in every view of the dataset) of places in this view."""
        if self._chosen is None:
            return self.starts[shards] + members
        ids = np.empty(len(shards), dtype=np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            ids[here] = self.starts[shard] + self._chosen[shard][members[here]]
        return ids

    def all_ids(self) -> Ints:
        """The ids of all samples of this view, ascending."""
        if self._chosen is None:
            return np.arange(len(self), dtype=np.int64)
        return np.concatenate([self.starts[s] + chosen for s, chosen in enumerate(self._chosen)])

    def labels(self) -> Ints:
        """Class numbers of this view's samples in id order, -1 where there is none: int64 (n,)."""
        return self._all_labels[self.all_ids()]

    @cached_property
    def _all_labels(self) -> Ints:
        return np.concatenate([self._index(shard).labels for shard in range(len(self.paths))])

    def shard(self, identity: int) -> int:
        """The number of the shard that holds sample `identity`."""
        return self._place(identity)[0]

    def sample(self, identity: int) -> dict[str, bytes]:
        """Every part of a sample by its extension (`jpg`, `txt`, `json`, …), as stored.

        Raises `DamagedData` where one cannot be read as it was written.
        """
        shard, member = self._place(identity)
        index = self._index(shard)
        present = [column for column in range(len(index.parts)) if index.sizes[member, column] >= 0]
        return {index.parts[column]: self._part(shard, member, column) for column in present}

    def key(self, identity: int) -> str:
        """The key under which sample `identity` stands in its tar."""
        shard, member = self._place(identity)
        return self._index(shard).key(member)

    def image(self, identity: int) -> tuple[bytes, int]:
        """Encoded picture and label of a sample; raises `UserError` when it has no picture."""
        shard, member = self._place(identity)
        index = self._index(shard)
        for column, part in enumerate(index.parts):
            if part in IMAGE_PARTS and index.sizes[member, column] >= 0:
                return self._part(shard, member, column), int(index.labels[member])
        raise UserError(f"sample {index.key(member)!r} in {self.paths[shard]} holds no picture ({index.parts})")

    def row(self, identity: int) -> Ints:
        """The `context + 1` token ids of a row: int64 (context + 1,)."""
        assert self.context is not None
        shard, row = self._place(identity)
        block_tokens = self.manifest["block_tokens"]
        first = row * self.context
        last = first + self.context + 1
        pieces = []
        for block in range(first // block_tokens, (last - 1) // block_tokens + 1):
            tokens = _tokens(self._part(shard, block, 0), self.manifest["dtype"])
            start = block * block_tokens
            pieces.append(tokens[max(first - start, 0) : last - start])
        return np.concatenate(pieces).astype(np.int64)

    def split(self, validation: float) -> tuple[Self, Self]:
        """Two views, (train, validation): a sample's key decides on which side it falls.

        Raises:
            UserError: for text (whose rows share documents), a share outside (0, 1), or an empty side.
        """
        if not 0 < validation < 1:
            raise UserError(f"a validation share of {validation} is not between 0 and 1")
        if self.kind != "images":
            raise UserError("text is split by document when it is sharded: headwater shard text --validation")
        sides: tuple[list[Ints], list[Ints]] = ([], [])
        for shard in range(len(self.paths)):
            held_out = hash_texts(_SPLIT_SEED, self._index(shard).keys) < np.uint64(validation * 2.0**64)
            members = np.arange(len(held_out)) if self._chosen is None else self._chosen[shard]
            sides[0].append(members[~held_out[members]])
            sides[1].append(members[held_out[members]])
        train, valid = self._view(sides[0]), self._view(sides[1])
        if not len(train) or not len(valid):
            raise UserError(f"a validation share of {validation} leaves one side of {len(self)} samples empty")
        return train, valid

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay behind when a worker process gets its copy.
        return self.__dict__ | {"_files": OrderedDict()}

    def _view(self, chosen: list[Ints]) -> Self:
        view = self.__class__.__new__(self.__class__)
        view.__dict__.update(self.__dict__ | {"_chosen": chosen, "_files": OrderedDict()})
        return view

    def _sample_counts(self) -> Ints:
        shards = self.manifest["shards"]
        if self.context is None or self.kind != "text":
            return np.array([shard["samples"] for shard in shards], dtype=np.int64)
        rows = np.array([max(0, shard["tokens"] - 1) // self.context for shard in shards], dtype=np.int64)
        if not rows.sum():
            longest = max(shard["tokens"] for shard in shards)
            raise UserError(f"no shard of {self.folder} has {self.context + 1} tokens (the longest has {longest})")
        return rows

    def _place(self, identity: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, identity, side="right")) - 1
        return shard, int(identity - self.starts[shard])

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._indexes:
            self._indexes[shard] = self.storage.index(shard)
        return self._indexes[shard]

    def _part(self, shard: int, member: int, column: int) -> bytes:
        index = self._index(shard)
        size, offset = int(index.sizes[member, column]), int(index.offsets[member, column])
        descriptor = self._file(shard)
        try:
            payload = os.pread(descriptor, size, offset)
        except OSError as error:
            raise DamagedData(f"cannot read {self.paths[shard]}: {error.strerror}") from None
        good = len(payload) == size
        if good and len(index.checksums):
            good = checksum(payload) == int(index.checksums[member, column])
        elif good:
            self.storage.check(shard, descriptor)
        if not good:
            raise DamagedData(
                f"{self.paths[shard]} has changed or is damaged: sample {index.key(member)!r} does not match "
                "its index; run `headwater inspect` and restore the shard"
            )
        return payload

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            self._files[shard] = self.storage.open(shard)
            if len(self._files) > self.storage.most_open:
                os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)


def _tokens(payload: bytes, dtype: str) -> NDArray[Any]:
    """The array in a version-1 npy file, without parsing its header's text."""
    assert payload.startswith(_NPY_MAGIC)
    return np.frombuffer(payload, dtype=np.dtype(dtype), offset=10 + int.from_bytes(payload[8:10], "little"))
