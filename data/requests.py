"""What a process asks to be read: positions to samples, before any worker is involved.

So the number of workers cannot change which samples make up a batch, nor their order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from data.errors import UserError
from data.keyed import sample_keys
from data.order import BLOCK_SAMPLES, Ints

if TYPE_CHECKING:
    from data.mixture import Samples


class Request(NamedTuple):
    """One microbatch."""

    ids: Ints
    keys: Ints


@dataclass(frozen=True)
class Share:
    """Which part of every global batch a process takes, and in what pieces."""

    rank: int
    world_size: int
    most: int | None
    """Most samples of a microbatch."""
    lanes: int
    shuffle_samples: int = BLOCK_SAMPLES
    """Samples mixed at least; see `data.order`."""

    def check(self, batch_size: int) -> None:
        """Raises `UserError` when a global batch of this size cannot be split evenly."""
        if batch_size < 1 or (self.most is not None and self.most < 1):
            raise UserError(f"a batch of {batch_size} and a microbatch of {self.most} samples: use at least 1 each")
        if batch_size % self.world_size:
            nearest = max(1, round(batch_size / self.world_size)) * self.world_size
            raise UserError(
                f"a global batch of {batch_size} cannot be split evenly over {self.world_size} processes; "
                f"use {nearest} (train.batch_size={nearest}) or another number of processes"
            )
        if self.lanes < 1 or batch_size % self.lanes:
            raise UserError(
                f"a global batch of {batch_size} cannot be split evenly over {self.lanes} lanes; "
                "choose a divisor of it (data.lanes)"
            )
        local = batch_size // self.world_size
        if local % self.microbatch(batch_size):
            raise UserError(
                f"{local} samples a process cannot be split into microbatches of {self.most}; "
                f"choose a divisor of {local} (train.microbatch)"
            )

    def microbatch(self, batch_size: int) -> int:
        """Samples of a microbatch of such a global batch."""
        local = batch_size // self.world_size
        return local if self.most is None else min(self.most, local)

    def positions(self, start: int, batch_size: int) -> Ints:
        """This process's positions of the global batch at `start`: a contiguous piece of it, lane by lane."""
        local = batch_size // self.world_size
        places = np.arange(self.rank * local, (self.rank + 1) * local, dtype=np.int64)
        if self.lanes == 1:
            return start + places
        in_lane = batch_size // self.lanes
        lane, step = places // in_lane, places % in_lane
        return start + (lane - start) % self.lanes + step * self.lanes

    def lanes_read(self, batch_size: int) -> range:
        """The lanes that this process reads from."""
        local, in_lane = batch_size // self.world_size, batch_size // self.lanes
        return range(self.rank * local // in_lane, ((self.rank + 1) * local - 1) // in_lane + 1)


class Requests(Sampler[Request]):
    """An endless stream of one process's microbatches from position `start` on."""

    def __init__(
        self,
        dataset: Samples,
        share: Share,
        size_at: Callable[[int], int],
        seed: int,
        start: int,
    ) -> None:
        """`size_at` tells the size of the global batch that begins at a position."""
        self.stream = dataset.stream(seed, share.lanes, share.shuffle_samples)
        self.share, self.size_at, self.seed, self.start = share, size_at, seed, start
        self.ends: deque[int | None] = deque()
        """For each microbatch handed out: the position after it where it ends a global batch, else None."""

    def __iter__(self) -> Iterator[Request]:
        start, ends = self.start, self.ends
        while True:
            size = self.size_at(start)
            self.share.check(size)
            self.stream.ahead(start, self.share.lanes_read(size))
            epochs, ids = self.stream.locate(self.share.positions(start, size))
            keys = sample_keys(self.seed, epochs, ids)
            step = self.share.microbatch(size)
            for first in range(0, len(ids), step):
                ends.append(start + size if first + step == len(ids) else None)
                yield Request(ids[first : first + step], keys[first : first + step])
            start += size
