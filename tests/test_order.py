"""Laws of the order: everything once an epoch, any subset alike, epochs apart, mixed well."""

from __future__ import annotations

import copy
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import UserError
from data.order import Order

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any)
BLOCKS = st.integers(1, 20)
SEEDS = st.integers(-(2**63), 2**63 - 1)


def places(order: Order, positions: object) -> list[tuple[int, int, int]]:
    return list(zip(*(column.tolist() for column in order.locate(positions)), strict=True))


@st.composite
def orders(draw: st.DrawFn) -> Order:
    """Any shards, blocks and lanes."""
    counts = draw(COUNTS)
    lanes = draw(st.integers(1, min(7, sum(counts))))
    return Order(counts, draw(SEEDS), draw(BLOCKS), draw(st.sampled_from([1, 10, 2**20])), lanes)


@given(orders(), st.integers(0, 3))
def test_every_sample_comes_once_an_epoch(order: Order, epoch: int) -> None:
    first = epoch * order.total
    found = places(order, np.arange(first, first + order.total))
    assert sorted(found) == [(epoch, shard, member) for shard, n in enumerate(order.counts) for member in range(n)]


@given(orders(), st.data())
def test_any_positions_alone_are_what_they_are_in_the_whole(order: Order, data: st.DataObject) -> None:
    whole = places(order, np.arange(3 * order.total))
    wanted = data.draw(st.lists(st.integers(0, 3 * order.total - 1), max_size=20))
    assert places(order, wanted) == [whole[p] for p in wanted]
    # Nor does it matter what was asked before.
    fresh = copy.copy(order)
    for cache in ("_epochs", "_bounds", "_blocks"):
        setattr(fresh, cache, OrderedDict())
    assert places(fresh, wanted) == [whole[p] for p in wanted]


@given(orders(), st.data())
def test_what_is_said_to_come_comes(order: Order, data: st.DataObject) -> None:
    """The shards to fetch ahead hold the sample at hand and the next ones of the same lane."""
    position = data.draw(st.integers(0, 3 * order.total))
    lane = position % order.lanes
    following = order.upcoming(position, [lane])
    assert int(order.locate([position]).shards[0]) in following
    assert set(following) <= set(order.upcoming(position))


@given(st.integers(2, 6), st.integers(20, 60), st.integers(0, 99))
def test_a_lane_reads_its_share_of_the_shards(lanes: int, shards: int, seed: int) -> None:
    """And lanes share no more than the shards that their borders cut."""
    order = Order([5] * shards, seed, lanes=lanes)
    positions = np.arange(order.total, 2 * order.total)
    read = order.locate(positions).shards
    touched = [len(np.unique(read[positions % lanes == lane])) for lane in range(lanes)]
    assert max(touched) <= -(-shards // lanes) + 1
    assert sum(touched) <= shards + lanes - 1


@given(st.lists(st.integers(5, 30), min_size=2, max_size=40), SEEDS)
def test_epochs_and_seeds_differ(counts: list[int], seed: int) -> None:
    order, other = Order(counts, seed), Order(counts, seed ^ 1)
    epochs = [[place[1:] for place in places(order, np.arange(e * order.total, (e + 1) * order.total))] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [place[1:] for place in places(other, np.arange(order.total))]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), BLOCKS)
def test_a_block_touches_fewer_than_twice_its_shards(counts: list[int], block: int) -> None:
    order = Order(counts, 0, block, 1)
    shards = order.locate(np.arange(order.total)).shards
    # Each shard is read within one stretch as long as its block, so few files are open at a time.
    for shard in range(len(counts)):
        where = np.flatnonzero(shards == shard)
        inside = np.unique(shards[where[0] : where[-1] + 1])
        assert len(inside) < 2 * block


@pytest.mark.parametrize("lanes", [1, 8])
def test_memory_does_not_grow_with_the_dataset(lanes: int) -> None:
    """20 and 1,000 million samples: a block stays as small, and only 16 bytes a shard are added."""
    held = []
    for shards in (2_000, 100_000):
        order = Order(np.full(shards, 10_000), 0, lanes=lanes)
        order.locate(np.arange(order.total // 2, order.total // 2 + 512))
        held.append(sum(block.permuted.nbytes for block in order._blocks.values()))
        assert len(order._blocks) <= 2 * lanes
        assert sum(e.shards.nbytes + e.starts.nbytes for e in order._epochs.values()) <= 2 * 16 * (shards + 1)
    assert max(held) <= 2 * 4 * 2 * 2**20 + lanes * 4 * 4 * 2 * 10_000
    assert held[1] <= 1.5 * held[0]


def test_batches_of_class_sorted_shards_look_drawn_at_random() -> None:
    """20 shards, each of one of 10 classes: the class counts of batches vary as if drawn without replacement."""
    order, size, classes = Order([200] * 20, seed=4), 50, 10
    labels = order.locate(np.arange(order.total)).shards % classes
    counts = np.stack([np.bincount(batch, minlength=classes) for batch in labels.reshape(-1, size)])
    expected = size / classes
    # Per cell E[(n - e)^2] = e (1 - 1/c) times the finite-population factor (4000 - 50) / (4000 - 1).
    spread = ((counts - expected) ** 2).mean() / (expected * (1 - 1 / classes) * 3950 / 3999)
    assert 0.85 < spread < 1.15
    # Neighbours are of one class as often as in a random order.
    assert abs((labels[1:] == labels[:-1]).mean() - 1 / classes) < 0.02


def test_mixing_fewer_shards_shuffles_less() -> None:
    """The statistic above can fail: a block of one shard gives batches of one class."""
    labels = Order([200] * 20, seed=4, block_shards=1, block_samples=1).locate(np.arange(4000)).shards % 10
    assert (labels[1:] == labels[:-1]).mean() > 0.9


def test_positions_far_ahead_cost_nothing() -> None:
    order = Order([3, 4], 0)
    assert places(order, [7 * 10**12 + 3])[0][0] == 10**12


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_no_samples_is_an_error(counts: list[int]) -> None:
    with pytest.raises(UserError, match="no samples"):
        Order(counts, 0)


def test_upcoming_shards_are_those_of_the_next_samples() -> None:
    order = Order([3, 5, 2, 7, 1, 4, 6], seed=3, block_shards=3, block_samples=1)
    for position in range(3 * order.total):
        needed = order.locate(np.arange(position, position + 6)).shards
        assert order.locate([position]).shards[0] in order.upcoming(position)[:4]
        assert set(needed.tolist()) <= set(order.upcoming(position))


@pytest.mark.parametrize("lanes", [0, 8])
def test_lanes_need_samples(lanes: int) -> None:
    with pytest.raises(UserError, match=r"data\.lanes"):
        Order([3, 4], 0, lanes=lanes)
