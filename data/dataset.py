"""Random access to the samples of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.index import IMAGE_PARTS, TEXT_PARTS
from data.keyed import hash_texts
from data.order import BLOCK_SAMPLES, Order
from data.reader import ShardReader
from data.source import open_source

Ints = NDArray[np.int64]
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_SPLIT_SEED = 0x5B17


class ShardedDataset:
    """Random access to the samples of tar shards.

    `source` is a folder written by `headwater shard`, a folder or glob of WebDataset tars made elsewhere
    (indexed on first use), or a list of tars. `len()` counts samples: pictures, or for text the rows of
    `context + 1` tokens that start every `context` tokens within a shard (the tail of each shard that
    fills no row is not used: less than `context` tokens a shard, see `tail_at`).
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
        self.folders = [self.folder]
        self.context = context
        if self.kind == "text" and (context is None or context < 1):
            raise UserError(f"{self.folder} holds text; give the number of tokens in a row (context), at least 1")
        self.sizes = self._sample_counts()
        """Samples of each shard, before any split."""
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        """The first sample id of each shard."""
        self.reader = ShardReader(self.storage, IMAGE_PARTS if self.kind == "images" else TEXT_PARTS)
        self._chosen: list[NDArray[np.uint32]] | None = None

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
        return np.concatenate([self.storage.index(shard).labels for shard in range(len(self.paths))])

    def shard(self, identity: int) -> int:
        """The number of the shard that holds sample `identity`."""
        return int(self._places(np.array([identity]))[0][0])

    def shard_name(self, identity: int) -> str:
        """The path or URL of the shard that holds sample `identity`."""
        return str(self.paths[self.shard(identity)])

    def sample(self, identity: int) -> dict[str, bytes]:
        """Every part of a sample by its extension (`jpg`, `txt`, `json`, …), as stored.

        Raises `DamagedData` where one cannot be read as it was written.
        """
        shards, members = self._places(np.array([identity], dtype=np.int64))
        index = self.reader.index(int(shards[0]))
        present = [part for part, size in zip(index.parts, index.sizes[members[0]], strict=True) if size >= 0]
        return {part: ShardReader(self.storage, (part,)).read(shards, members)[0][0] for part in present}

    def key(self, identity: int) -> str:
        """The key under which sample `identity` stands in its tar."""
        shards, members = self._places(np.array([identity]))
        return self.reader.index(int(shards[0])).key(int(members[0]))

    def pictures(self, ids: Ints) -> tuple[list[bytes], Ints]:
        """Encoded pictures of samples and their labels, int64 (n,); raises `DamagedData`."""
        return self.reader.read(*self._places(ids))

    def image(self, identity: int) -> tuple[bytes, int]:
        """Encoded picture and label of a sample; raises `DamagedData` when it has no picture."""
        payloads, labels = self.pictures(np.array([identity], dtype=np.int64))
        return payloads[0], int(labels[0])

    def rows(self, ids: Ints) -> Ints:
        """The token ids of rows: int64 (n, context + 1)."""
        assert self.context is not None
        shards, rows = self._places(ids)
        block_tokens, dtype = self.manifest["block_tokens"], self.manifest["dtype"]
        firsts = rows * self.context
        blocks = firsts // block_tokens
        counts = (firsts + self.context) // block_tokens - blocks + 1
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        payloads, _ = self.reader.read(np.repeat(shards, counts), np.repeat(blocks, counts) + within)
        found = np.empty((len(ids), self.context + 1), dtype=np.int64)
        done = 0
        for place, (first, count) in enumerate(zip((firsts - blocks * block_tokens).tolist(), counts, strict=True)):
            pieces = [_tokens(payload, dtype) for payload in payloads[done : done + count]]
            tokens = pieces[0] if count == 1 else np.concatenate(pieces)
            found[place] = tokens[first : first + self.context + 1]
            done += count
        return found

    def blocks(self) -> Iterator[NDArray[Any]]:
        """The whole token stream of a text, block by block."""
        for shard, facts in enumerate(self.manifest["shards"]):
            for block in range(facts["samples"]):
                payloads, _ = self.reader.read(np.array([shard]), np.array([block]))
                yield _tokens(payloads[0], self.manifest["dtype"])

    def row(self, identity: int) -> Ints:
        """The `context + 1` token ids of a row: int64 (context + 1,)."""
        return self.rows(np.array([identity], dtype=np.int64))[0]

    def stream(self, seed: int, lanes: int = 1, shuffle_samples: int = BLOCK_SAMPLES) -> SampleStream:
        """This view's samples in shuffled order, by position; see `data.order` for lanes and samples mixed.

        Raises `UserError` when it is empty.
        """
        return _Shuffled(self, Order(self.counts, seed, block_samples=shuffle_samples, lanes=lanes))

    def tail_at(self, context: int) -> float:
        """Share of a text's tokens that lie in no row of `context + 1`: what is left at the end of each shard."""
        tokens = np.array([shard["tokens"] for shard in self.manifest["shards"]], dtype=np.int64)
        rows = (tokens - 1).clip(0) // context
        return float(1 - np.where(rows > 0, rows * context + 1, 0).sum() / tokens.sum())

    def split(self, validation: float) -> tuple[Self, Self]:
        """Two views, (train, validation): a sample's key decides on which side it falls.

        Raises:
            UserError: for text (whose rows share documents), a share outside (0, 1), or an empty side.
        """
        if not 0 < validation < 1:
            raise UserError(f"a validation share of {validation} is not between 0 and 1")
        if self.kind != "images":
            raise UserError("text is split by document when it is sharded: headwater shard text --validation")
        sides: tuple[list[NDArray[np.uint32]], list[NDArray[np.uint32]]] = ([], [])
        for shard in range(len(self.paths)):
            held_out = hash_texts(_SPLIT_SEED, self.storage.index(shard).keys) < np.uint64(validation * 2.0**64)
            members = np.arange(len(held_out), dtype=np.uint32) if self._chosen is None else self._chosen[shard]
            sides[0].append(members[~held_out[members]])
            sides[1].append(members[held_out[members]])
        train, valid = self._view(sides[0]), self._view(sides[1])
        if not len(train) or not len(valid):
            raise UserError(f"a validation share of {validation} leaves one side of {len(self)} samples empty")
        return train, valid

    def copy(self) -> Self:
        """The same view with a reader of its own, for another thread."""
        return self._view(self._chosen)

    def _view(self, chosen: list[NDArray[np.uint32]] | None) -> Self:
        view = self.__class__.__new__(self.__class__)
        view.__dict__.update(self.__dict__ | {"_chosen": chosen, "reader": self.reader.copy()})
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

    def _places(self, ids: Ints) -> tuple[Ints, Ints]:
        """Shards and members of samples."""
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        return shards, ids - self.starts[shards]


class SampleStream(Protocol):
    """Samples by position, for ever."""

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """Epochs and ids of the samples at `positions`, counted since the start of training."""

    def ahead(self, position: int, lanes: Sequence[int]) -> None:
        """Say that a reader of these lanes has come to `position`, so that storage can fetch what follows."""


class _Shuffled:
    """One dataset in its own order."""

    def __init__(self, dataset: ShardedDataset, order: Order) -> None:
        self.dataset, self.order = dataset, order
        self._told: tuple[int, ...] = ()

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        place = self.order.locate(positions)
        return place.epochs, self.dataset.ids(place.shards, place.members)

    def ahead(self, position: int, lanes: Sequence[int]) -> None:
        following = self.order.upcoming(position, lanes)
        if following != self._told:
            self._check_room(self.order.at_hand(position, lanes))
            self.dataset.storage.ahead(following)
            self._told = following

    def _check_room(self, shards: Sequence[int]) -> None:
        """A cache that cannot hold what is mixed would fetch every shard again and again."""
        room = self.dataset.storage.most_bytes
        needed = sum(self.dataset.manifest["shards"][shard]["bytes"] for shard in shards)
        if room is not None and needed > room:
            fitting = int(self.order.counts[list(shards)].sum() * room / needed / 2)
            raise UserError(
                f"mixing the samples of {len(shards)} shards takes {needed / 1e9:.1f} GB of them at hand, more than "
                f"the {room / 1e9:.1f} GB of the cache; "
                f"set data.shuffle_samples={fitting} or a larger HEADWATER_CACHE_SIZE"
            )


def _tokens(payload: bytes, dtype: str) -> NDArray[Any]:
    """The array in a version-1 npy file, without parsing its header's text."""
    assert payload.startswith(_NPY_MAGIC)
    return np.frombuffer(payload, dtype=np.dtype(dtype), offset=10 + int.from_bytes(payload[8:10], "little"))
