"""Which sample comes at which position: a pure function, so that resuming is starting at a number.

An epoch's shards are permuted, then taken in blocks of `block_shards`; within a block all samples of all
its shards are permuted together. So a reader touches few files at a time, while every batch mixes many.
The order of one block is made when it is first asked for (8 bytes a sample of the block), whatever the
size of the dataset.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.keyed import hash64

Ints = NDArray[np.int64]
_SHARDS, _MEMBERS = 1, 2
"""Separate the hash that orders shards from the one that orders a block's members."""


class Place(NamedTuple):
    """Where samples lie: three int64 arrays of one length."""

    epochs: Ints
    shards: Ints
    members: Ints


class _Epoch(NamedTuple):
    shards: Ints
    """Shard numbers in this epoch's order."""
    block_starts: Ints
    """First position of each block within the epoch."""


class Order:
    """Position -> (epoch, shard, member) for shards of `counts` samples."""

    def __init__(self, counts: Sequence[int] | Ints, seed: int, block_shards: int = 16) -> None:
        """Raises `UserError` when there is no sample at all."""
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.block_shards = seed, block_shards
        self.total = int(self.counts.sum())
        if self.total == 0:
            raise UserError("the dataset holds no samples; check the folder that was sharded")
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], tuple[Ints, Ints]] = OrderedDict()

    def locate(self, positions: Sequence[int] | Ints) -> Place:
        """The samples at `positions` (counted since the start of training)."""
        where = np.asarray(positions, dtype=np.int64)
        epochs, offsets = where // self.total, where % self.total
        shards, members = np.empty_like(where), np.empty_like(where)
        for epoch in np.unique(epochs):
            plan = self._epoch(int(epoch))
            blocks = np.searchsorted(plan.block_starts, offsets, side="right") - 1
            for block in np.unique(blocks[epochs == epoch]):
                chosen = (epochs == epoch) & (blocks == block)
                block_shards, block_members = self._block(int(epoch), int(block))
                inside = offsets[chosen] - plan.block_starts[block]
                shards[chosen], members[chosen] = block_shards[inside], block_members[inside]
        return Place(epochs, shards, members)

    def upcoming(self, position: int) -> Ints:
        """Shards that a reader at `position` will need, soonest first: those of its block, then of the next."""
        shards, at = [], position
        for _ in range(2):
            epoch, offset = divmod(at, self.total)
            plan = self._epoch(epoch)
            block = int(np.searchsorted(plan.block_starts, offset, side="right")) - 1
            shards.append(plan.shards[block * self.block_shards : (block + 1) * self.block_shards])
            ends = np.append(plan.block_starts[1:], self.total)
            at = epoch * self.total + int(ends[block])
        return np.concatenate(shards)

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            numbers = np.arange(len(self.counts), dtype=np.int64)
            shards = np.argsort(hash64(self.seed, epoch, _SHARDS, numbers), kind="stable")
            starts = np.cumsum(self.counts[shards]) - self.counts[shards]
            _remember(self._epochs, epoch, _Epoch(shards, starts[:: self.block_shards]))
        return self._epochs[epoch]

    def _block(self, epoch: int, block: int) -> tuple[Ints, Ints]:
        """Shard and member of each place in a block."""
        if (epoch, block) not in self._blocks:
            first = block * self.block_shards
            shards = self._epoch(epoch).shards[first : first + self.block_shards]
            counts = self.counts[shards]
            size = int(counts.sum())
            places = np.arange(size, dtype=np.int64)
            permuted = np.argsort(hash64(self.seed, epoch, _MEMBERS, block, places), kind="stable")
            members = places - np.repeat(np.cumsum(counts) - counts, counts)
            _remember(self._blocks, (epoch, block), (np.repeat(shards, counts)[permuted], members[permuted]))
        return self._blocks[epoch, block]


def _remember(cache: OrderedDict, key: object, value: object, most: int = 2) -> None:
    cache[key] = value
    while len(cache) > most:
        cache.popitem(last=False)
