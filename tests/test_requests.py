"""Laws 3, 5 and 6 of the order of samples, for any shards, processes, microbatches, lanes, starts and batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data.cycle import Cycle
from data.errors import UserError
from data.keyed import sample_keys
from data.mixture import _Mixed
from data.order import Ints, Order
from data.requests import Requests, Share


@dataclass
class Numbered:
    """Samples that are no more than their numbers."""

    counts: list[int]
    told: list[int] = field(default_factory=list)

    def stream(self, seed: int, lanes: int, shuffle_samples: int) -> Any:
        self.order = Order(self.counts, seed, block_shards=2, block_samples=shuffle_samples, lanes=lanes)
        return self

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        place = self.order.locate(positions)
        starts = np.concatenate([[0], np.cumsum(self.counts)])
        return place.epochs, starts[place.shards] + place.members

    def ahead(self, position: int, lanes: Sequence[int]) -> None:
        self.told = list(self.order.upcoming(position, lanes))


@dataclass
class Several:
    """A mixture of such."""

    parts: list[Numbered]
    shares: list[int]

    def stream(self, seed: int, lanes: int, shuffle_samples: int) -> Any:
        streams = [part.stream(seed + number, lanes, shuffle_samples) for number, part in enumerate(self.parts)]
        starts = np.cumsum([0] + [sum(part.counts) for part in self.parts])
        return _Mixed(streams, starts, Cycle(self.shares, seed), lanes)


COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda counts: sum(counts) >= 4)


@st.composite
def datasets(draw: st.DrawFn) -> Numbered | Several:
    """One dataset, or a mixture."""
    parts = [Numbered(counts) for counts in draw(st.lists(COUNTS, min_size=1, max_size=3))]
    return parts[0] if len(parts) == 1 else Several(parts, [draw(st.integers(1, 5)) for _ in parts])


def taken(
    dataset: Any, share: Share, size: int | Callable[[int], int], start: int, batches: int, seed: int = 7
) -> list[list[tuple[int, int]]]:
    """(id, key) pairs of one process's share of some global batches."""
    size_at = size if callable(size) else lambda _: size
    requests = Requests(dataset, share, size_at, seed, start)
    found: list[list[tuple[int, int]]] = [[]]
    for request in requests:
        found[-1] += list(zip(request.ids.tolist(), request.keys.tolist(), strict=True))
        if requests.ends.popleft() is not None:
            if len(found) == batches:
                return found
            found.append([])
    raise AssertionError


@given(
    datasets(),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([None, 1, 2, 4]),
    st.integers(0, 300),
    st.sampled_from([1, 20, 2**20]),
)
def test_global_batches_are_the_same_for_any_processes_and_microbatches(
    dataset: Any, world_size: int, lanes: int, microbatch: int | None, start: int, mixed: int
) -> None:
    size, batches = 24, 4
    assume(microbatch is None or size // world_size % microbatch == 0)
    whole = taken(dataset, Share(0, 1, None, lanes, mixed), size, start, batches)
    ranks = [
        taken(dataset, Share(rank, world_size, microbatch, lanes, mixed), size, start, batches)
        for rank in range(world_size)
    ]
    joined = [[pair for rank in ranks for pair in rank[number]] for number in range(batches)]
    assert joined == whole
    # Lanes group a batch's samples; which they are, and their keys, is what the stream says.
    epochs, ids = dataset.stream(7, lanes, mixed).locate(np.arange(start, start + batches * size))
    pairs = list(zip(ids.tolist(), sample_keys(7, epochs, ids).tolist(), strict=True))
    assert [sorted(batch) for batch in whole] == [sorted(pairs[i : i + size]) for i in range(0, len(pairs), size)]


@given(datasets(), st.integers(0, 5), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]))
def test_resuming_is_starting_at_a_position(dataset: Any, done: int, world_size: int, lanes: int) -> None:
    """With another number of processes too."""
    straight = taken(dataset, Share(0, 1, None, lanes), 8, 0, 8)
    ranks = [taken(dataset, Share(r, world_size, None, lanes), 8, 8 * done, 3) for r in range(world_size)]
    assert [[p for rank in ranks for p in rank[number]] for number in range(3)] == straight[done : done + 3]


@given(COUNTS, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(0, 2))
def test_an_epoch_holds_every_sample_once(counts: list[int], world_size: int, lanes: int, epoch: int) -> None:
    assume(sum(counts) % 4 == 0)
    total = sum(counts)
    ranks = [
        taken(Numbered(counts), Share(r, world_size, None, lanes), 4, epoch * total, total // 4)
        for r in range(world_size)
    ]
    seen = [identity for rank in ranks for batch in rank for identity, _ in batch]
    assert sorted(seen) == list(range(total))


@given(datasets(), st.lists(st.sampled_from([4, 8, 12, 24]), min_size=1, max_size=4), st.sampled_from([1, 2, 4]))
def test_a_growing_batch_goes_on_where_the_smaller_ended(dataset: Any, sizes: list[int], world_size: int) -> None:
    """The size is a function of the position, so a run may stop anywhere and know it again."""
    sizes = sorted(sizes)
    ends = np.cumsum([3 * size for size in sizes[:-1]]).tolist()  # three batches of each size, then the last for ever

    def size_at(position: int) -> int:
        return sizes[sum(position >= end for end in ends)]

    batches = 3 * len(sizes)
    ranks = [taken(dataset, Share(r, world_size, None, 1), size_at, 0, batches) for r in range(world_size)]
    joined = [[pair for rank in ranks for pair in rank[number]] for number in range(batches)]
    assert [len(batch) for batch in joined] == [size for size in sizes for _ in range(3)]
    _, ids = dataset.stream(7, 1, 2**20).locate(np.arange(sum(map(len, joined))))
    assert [identity for batch in joined for identity, _ in batch] == ids.tolist()
    middle = sum(map(len, joined[: batches // 2]))
    assert taken(dataset, Share(0, 1, None, 1), size_at, middle, batches - batches // 2) == joined[batches // 2 :]


@given(st.integers(2, 4), st.integers(0, 99))
def test_a_process_reads_and_is_told_of_its_own_lanes_alone(world_size: int, seed: int) -> None:
    shards, size = 24, 6
    dataset = Numbered([size] * shards)
    read = []
    for rank in range(world_size):
        batches = taken(dataset, Share(rank, world_size, None, world_size), 12, 0, shards * size // 12, seed)
        read.append({identity // size for batch in batches for identity, _ in batch})
        assert len(read[-1]) <= -(-shards // world_size) + 1
    assert set().union(*read) == set(range(shards))


@pytest.mark.parametrize(
    ("share", "size", "message"),
    [
        (Share(0, 1, None, 3), 8, r"over 3 lanes; choose a divisor of it \(data.lanes\)"),
        (Share(0, 1, None, 0), 8, "over 0 lanes"),
        (Share(0, 3, None, 1), 8, "over 3 processes"),
        (Share(0, 1, 3, 1), 8, "microbatches of 3"),
    ],
)
def test_uneven_shares_are_refused(share: Share, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        share.check(size)
