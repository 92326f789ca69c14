"""Laws of the order: everything once an epoch, any subset alike, epochs apart, mixed well."""

from __future__ import annotations

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


@given(COUNTS, SEEDS, BLOCKS, st.integers(0, 3))
def test_every_sample_comes_once_an_epoch(counts: list[int], seed: int, block: int, epoch: int) -> None:
    order = Order(counts, seed, block)
    first = epoch * order.total
    found = places(order, np.arange(first, first + order.total))
    assert sorted(found) == [(epoch, shard, member) for shard, n in enumerate(counts) for member in range(n)]


@given(COUNTS, SEEDS, BLOCKS, st.data())
def test_any_positions_alone_are_what_they_are_in_the_whole(
    counts: list[int], seed: int, block: int, data: st.DataObject
) -> None:
    order = Order(counts, seed, block)
    whole = places(order, np.arange(3 * order.total))
    wanted = data.draw(st.lists(st.integers(0, 3 * order.total - 1), max_size=20))
    assert places(order, wanted) == [whole[p] for p in wanted]
    # Nor does it matter what was asked before.
    assert places(Order(counts, seed, block), wanted) == [whole[p] for p in wanted]


@given(st.lists(st.integers(5, 30), min_size=2, max_size=40), SEEDS)
def test_epochs_and_seeds_differ(counts: list[int], seed: int) -> None:
    order, other = Order(counts, seed), Order(counts, seed ^ 1)
    epochs = [[place[1:] for place in places(order, np.arange(e * order.total, (e + 1) * order.total))] for e in (0, 1)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [place[1:] for place in places(other, np.arange(order.total))]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60), BLOCKS)
def test_a_block_touches_no_more_than_its_shards(counts: list[int], block: int) -> None:
    order = Order(counts, 0, block)
    shards = order.locate(np.arange(order.total)).shards
    # Each shard is read within one stretch as long as its block, so few files are open at a time.
    for shard in range(len(counts)):
        where = np.flatnonzero(shards == shard)
        inside = np.unique(shards[where[0] : where[-1] + 1])
        assert len(inside) <= block


def test_batches_of_class_sorted_shards_look_drawn_at_random() -> None:
    """20 shards, each of one of 10 classes: the class counts of batches vary as if drawn without replacement."""
    order, size, classes = Order([200] * 20, seed=4, block_shards=20), 50, 10
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
    labels = Order([200] * 20, seed=4, block_shards=1).locate(np.arange(4000)).shards % 10
    assert (labels[1:] == labels[:-1]).mean() > 0.9


def test_positions_far_ahead_cost_nothing() -> None:
    order = Order([3, 4], 0)
    assert places(order, [7 * 10**12 + 3])[0][0] == 10**12


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_no_samples_is_an_error(counts: list[int]) -> None:
    with pytest.raises(UserError, match="no samples"):
        Order(counts, 0)


def test_upcoming_shards_are_those_of_the_next_samples() -> None:
    order = Order(np.array([3, 5, 2, 7, 1, 4, 6]), seed=3, block_shards=3)
    for position in range(3 * order.total):
        needed = order.locate(np.arange(position, position + 6)).shards
        assert order.locate([position]).shards[0] in order.upcoming(position)[:3]
        assert set(needed.tolist()) <= set(order.upcoming(position).tolist())
