"""Which sample comes at which position: a pure function, so that resuming is starting at a number.

An epoch's shards are permuted and laid end to end on a line. The line is cut into `lanes` stretches of (all
but) equal length, each lane into blocks of whole shards, and the samples of each block are permuted. Position
`p` belongs to lane `p % lanes`; so a node that reads only its own lanes touches about `1 / nodes` of the
shards, while every batch, and every sample of it, is the same for any number of readers.

Memory, whatever the number of samples: 16 bytes a shard and 4 bytes a sample of a block, both for at most two
epochs and two blocks a lane that is asked for. A block holds at least `block_shards` shards and about
`block_samples` samples (split among the lanes), and less than twice as many.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.keyed import hash64

Ints = NDArray[np.int64]
BLOCK_SHARDS = 16
"""Fewest shards to mix: class-sorted shards need many."""
BLOCK_SAMPLES = 2**20
"""Samples to mix where 16 shards hold fewer: costs 4 to 8 MiB, and shuffles ImageNet as a whole."""
_LANE_SHARDS = 4
"""Fewest shards to mix within one of several lanes (which a batch mixes further)."""
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
    starts: Ints
    """First sample of each on the line, and the line's length."""


class _Block(NamedTuple):
    first: int
    """Position within its lane."""
    last: int
    line: int
    """First sample on the line."""
    permuted: NDArray[Any]
    """Where on the line, counted from `line`, each of its samples comes from."""


class Order:
    """Position -> (epoch, shard, member) for shards of `counts` samples."""

    def __init__(
        self,
        counts: Sequence[int] | Ints,
        seed: int,
        block_shards: int = BLOCK_SHARDS,
        block_samples: int = BLOCK_SAMPLES,
        lanes: int = 1,
    ) -> None:
        """Raises `UserError` when there is no sample at all, or less than one a lane."""
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.lanes = seed, lanes
        self.total = int(self.counts.sum())
        if self.total == 0:
            raise UserError("the dataset holds no samples; check the folder that was sharded")
        if not 1 <= lanes <= self.total:
            raise UserError(f"{self.total} samples cannot be read in {lanes} lanes; use 1 to {self.total} (data.lanes)")
        full = int((self.counts > 0).sum())
        wanted = max(block_shards, -(-block_samples * full // self.total))
        self.block_shards = wanted if lanes == 1 else max(_LANE_SHARDS, -(-wanted // lanes))
        """Fewest shards of a block within one lane."""
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._bounds: OrderedDict[tuple[int, int], Ints] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], _Block] = OrderedDict()

    def locate(self, positions: Sequence[int] | Ints) -> Place:
        """The samples at `positions` (counted since the start of training)."""
        where = np.asarray(positions, dtype=np.int64)
        epochs, offsets = where // self.total, where % self.total
        shards, members = np.empty_like(where), np.empty_like(where)
        groups = epochs * self.lanes + where % self.lanes
        for group in np.unique(groups):
            chosen = np.flatnonzero(groups == group)
            epoch, lane = divmod(int(group), self.lanes)
            line = self._line(epoch, lane, offsets[chosen] // self.lanes)
            plan = self._epoch(epoch)
            slots = np.searchsorted(plan.starts, line, side="right") - 1
            shards[chosen], members[chosen] = plan.shards[slots], line - plan.starts[slots]
        return Place(epochs, shards, members)

    def upcoming(self, position: int, lanes: Sequence[int] | None = None) -> tuple[int, ...]:
        """The shards of the blocks that hold `position` and of those that follow, soonest first.

        Args:
            lanes: those that the asking process reads; all without it.
        """
        now, then = [], []
        for epoch, lane, block in self._blocks_at(position, lanes):
            now += self._block_shards(epoch, lane, block)
            last = block + 2 == len(self._lane_bounds(epoch, lane))
            then += self._block_shards(epoch + 1, lane, 0) if last else self._block_shards(epoch, lane, block + 1)
        return tuple(dict.fromkeys(now + then))

    def at_hand(self, position: int, lanes: Sequence[int] | None = None) -> tuple[int, ...]:
        """The shards that are mixed with one another at `position`, and so are read in turn."""
        found = [shard for block in self._blocks_at(position, lanes) for shard in self._block_shards(*block)]
        return tuple(dict.fromkeys(found))

    def _blocks_at(self, position: int, lanes: Sequence[int] | None) -> list[tuple[int, int, int]]:
        """Epoch, lane and number of the block of each lane that holds `position`, or comes to it next."""
        epoch, offset = divmod(position, self.total)
        found = []
        for lane in range(self.lanes) if lanes is None else lanes:
            inside = min(offset // self.lanes, self._length(epoch, lane) - 1)
            found.append((epoch, lane, int(np.searchsorted(self._lane_bounds(epoch, lane), inside, side="right")) - 1))
        return found

    def _line(self, epoch: int, lane: int, insides: Ints) -> Ints:
        """Places on the epoch's line of places within one lane."""
        bounds = self._lane_bounds(epoch, lane)
        blocks = np.searchsorted(bounds, insides, side="right") - 1
        line = np.empty_like(insides)
        for number in np.unique(blocks):
            block = self._block(epoch, lane, int(number))
            here = blocks == number
            line[here] = block.line + block.permuted[insides[here] - block.first]
        return line

    def _length(self, epoch: int, lane: int) -> int:
        """Samples of a lane: those offsets of the epoch whose position falls on it."""
        first = (lane - epoch * self.total) % self.lanes
        return -(-(self.total - first) // self.lanes)

    def _lane_start(self, epoch: int, lane: int) -> int:
        """Where a lane begins on the epoch's line."""
        return sum(self._length(epoch, before) for before in range(lane))

    def _lane_bounds(self, epoch: int, lane: int) -> Ints:
        """Where the blocks of a lane begin within it, and its length."""
        if (epoch, lane) not in self._bounds:
            starts = self._epoch(epoch).starts
            begin, length = self._lane_start(epoch, lane), self._length(epoch, lane)
            first, last = np.searchsorted(starts, [begin, begin + length - 1], side="right") - 1
            shards = int(last - first) + 1
            blocks = max(1, shards // self.block_shards)
            cuts = starts[first + shards * np.arange(1, blocks, dtype=np.int64) // blocks] - begin
            # Empty shards make empty blocks; they are dropped.
            bounds = np.unique(np.concatenate([[0], cuts.clip(0, length), [length]]))
            _remember(self._bounds, (epoch, lane), bounds, 2 * self.lanes)
        return self._bounds[epoch, lane]

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            numbers = np.arange(len(self.counts), dtype=np.int64)
            shards = np.argsort(hash64(self.seed, epoch, _SHARDS, numbers), kind="stable")
            _remember(self._epochs, epoch, _Epoch(shards, np.concatenate([[0], np.cumsum(self.counts[shards])])), 2)
        return self._epochs[epoch]

    def _block(self, epoch: int, lane: int, number: int) -> _Block:
        if (epoch, lane, number) not in self._blocks:
            bounds = self._lane_bounds(epoch, lane)
            first, last = int(bounds[number]), int(bounds[number + 1])
            places = np.arange(last - first, dtype=np.int64)
            # Distinct places have distinct hashes, so every sorting algorithm gives the same order.
            permuted = np.argsort(hash64(self.seed, epoch, _MEMBERS, lane, number, places))
            small = permuted.astype(np.uint32 if len(places) < 2**32 else np.int64)
            block = _Block(first, last, self._lane_start(epoch, lane) + first, small)
            _remember(self._blocks, (epoch, lane, number), block, 2 * self.lanes)
        else:
            self._blocks.move_to_end((epoch, lane, number))
        return self._blocks[epoch, lane, number]

    def _block_shards(self, epoch: int, lane: int, number: int) -> list[int]:
        """The shards that a block reads from, in the epoch's order."""
        plan, bounds = self._epoch(epoch), self._lane_bounds(epoch, lane)
        begin = self._lane_start(epoch, lane)
        ends = begin + bounds[[number, number + 1]] - [0, 1]
        first, last = np.searchsorted(plan.starts, ends, side="right") - 1
        slots = np.arange(first, last + 1)
        return [int(shard) for shard in plan.shards[slots] if self.counts[shard]]


def _remember(cache: OrderedDict, key: object, value: object, most: int) -> None:
    cache[key] = value
    while len(cache) > most:
        cache.popitem(last=False)
