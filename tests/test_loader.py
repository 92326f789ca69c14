"""Laws of the loader: global batches depend on the position alone, and resuming is starting at a number."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Iterable
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from data.canvas import decode
from data.dataset import ShardedDataset
from data.errors import UserError
from data.keyed import sample_keys
from data.loader import Loader, sequential
from data.shards import DatasetWriter

CANVAS = 8


def digests(batch: Any) -> list[str]:
    """One hash a sample, over every field: pixels, sizes, labels, keys, ids."""
    columns = [getattr(batch, field.name) for field in fields(batch)]
    return [hashlib.sha256(b"".join(c[i].numpy().tobytes() for c in columns)).hexdigest() for i in range(len(batch))]


def stream(dataset: ShardedDataset, samples: int, **arguments: Any) -> list[str]:
    """Hashes of the next `samples` samples of one process."""
    found: list[str] = []
    for batch in Loader(dataset, **arguments, canvas=CANVAS):
        found += digests(batch)
        if len(found) >= samples:
            return found[:samples]
    raise AssertionError("the loader ended")


@pytest.fixture(scope="module")
def dataset(picture_shards: Path) -> ShardedDataset:
    return ShardedDataset(picture_shards)


@pytest.fixture(scope="module")
def global_stream(dataset: ShardedDataset) -> list[str]:
    """The first 240 samples (nearly five epochs) as one process without workers reads them."""
    return stream(dataset, 240, batch_size=12, seed=5)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_global_batches_are_the_same_for_any_processes_and_workers(
    dataset: ShardedDataset, global_stream: list[str], world_size: int, workers: int
) -> None:
    local = 12 // world_size
    ranks = [
        stream(dataset, 5 * local, batch_size=12, seed=5, rank=rank, world_size=world_size, workers=workers)
        for rank in range(world_size)
    ]
    joined = [d for batch in range(5) for rank in ranks for d in rank[batch * local : (batch + 1) * local]]
    assert joined == global_stream[:60]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 200), st.sampled_from([1, 2, 5, 8, 40]))
def test_starting_anywhere_goes_on_as_the_straight_run(
    dataset: ShardedDataset, global_stream: list[str], start: int, batch_size: int
) -> None:
    # Any start, not only a multiple of the batch; any other batch size.
    assert stream(dataset, 40, batch_size=batch_size, seed=5, start=start) == global_stream[start : start + 40]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("microbatch", [None, 2])
def test_the_position_counts_what_was_consumed(
    dataset: ShardedDataset, global_stream: list[str], workers: int, microbatch: int | None
) -> None:
    """Not what workers have read ahead, nor half a global batch."""
    arguments = {"batch_size": 12, "seed": 5, "rank": 1, "world_size": 2, "microbatch": microbatch}
    loader = Loader(dataset, **arguments, canvas=CANVAS, start=36, workers=workers)
    assert loader.position == 36
    batches = iter(loader)
    for number in range(1, 8):
        next(batches)
        assert loader.position == 36 + number // loader.accumulation * 12
    taken_up = stream(dataset, 6, **arguments, start=loader.position)
    assert taken_up == global_stream[loader.position + 6 : loader.position + 12]
    # The same object goes on at its position too.
    again = next(iter(loader))
    assert digests(again) == taken_up[: len(again)]


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 3), st.sampled_from([1, 2]))
@settings(max_examples=20, deadline=None)
def test_microbatches_join_to_the_local_batch(
    dataset: ShardedDataset, microbatch: int, rank: int, world_size: int
) -> None:
    rank %= world_size
    arguments: dict[str, Any] = {"batch_size": 24, "rank": rank, "world_size": world_size, "canvas": CANVAS}
    loader = Loader(dataset, **arguments, microbatch=microbatch)
    pieces = list(islice(loader, loader.accumulation))
    assert all(len(piece) == microbatch for piece in pieces)
    assert [d for piece in pieces for d in digests(piece)] == digests(next(iter(Loader(dataset, **arguments))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 10, "world_size": 4}, r"10 cannot be split evenly over 4 processes; use 8 "),
        ({"batch_size": 1, "world_size": 4}, r"use 4 "),
        ({"batch_size": 12, "microbatch": 5}, "divisor of 12"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 12, "microbatch": 0}, "at least 1"),
        ({"batch_size": 12, "canvas": None}, "canvas"),
    ],
)
def test_uneven_splits_are_refused(dataset: ShardedDataset, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Loader(dataset, **({"canvas": CANVAS} | arguments))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_drawn_from_the_global_random_states(dataset: ShardedDataset, workers: int) -> None:
    before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
    for batch in islice(Loader(dataset, 12, canvas=CANVAS, workers=workers), 3):
        assert len(batch) == 12
    list(sequential(dataset, 20, canvas=CANVAS, workers=workers))
    assert before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002


def test_nor_do_they_change_the_order(dataset: ShardedDataset, global_stream: list[str]) -> None:
    torch.manual_seed(99)
    random.seed(99)
    assert stream(dataset, 24, batch_size=12, seed=5, workers=2) == global_stream[:24]


@pytest.mark.parametrize("workers", [0, 2])
def test_sequential_covers_each_sample_once_in_order(dataset: ShardedDataset, workers: int) -> None:
    batches = list(sequential(dataset, 8, canvas=CANVAS, workers=workers, seed=3))
    assert [len(batch) for batch in batches] == [8] * 6 + [2]
    ids = torch.cat([batch.ids for batch in batches])
    assert ids.tolist() == list(range(50))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [number % 3 for number in range(50)]
    assert torch.cat([batch.keys for batch in batches]).tolist() == sample_keys(3, 0, np.arange(50)).tolist()


def test_sequential_over_given_ids(dataset: ShardedDataset) -> None:
    wanted = [49, 0, 7, 7]
    batch = next(sequential(dataset, 10, canvas=CANVAS, ids=np.array(wanted)))
    assert batch.ids.tolist() == wanted
    for place, number in enumerate(wanted):
        pixels, size = decode(picture(number, 5 + number % 4, 5 + number % 3), CANVAS)
        assert torch.equal(batch.images[place], torch.from_numpy(pixels))
        assert tuple(batch.sizes[place].tolist()) == size
    assert list(sequential(dataset, 10, canvas=CANVAS, ids=np.array([], dtype=np.int64))) == []


def test_a_split_gives_each_sample_to_one_side_in_every_epoch(dataset: ShardedDataset) -> None:
    train, valid = dataset.split(0.3)
    sides = [set(side.all_ids().tolist()) for side in (train, valid)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(range(50))
    for side, ids in zip((train, valid), sides, strict=True):
        found = [i for b in islice(Loader(side, 1, canvas=CANVAS), 2 * len(side)) for i in b.ids.tolist()]
        assert set(found[: len(side)]) == set(found[len(side) :]) == ids
        assert side.labels().tolist() == [i % 3 for i in sorted(ids)]
    larger = set(dataset.split(0.6)[1].all_ids().tolist())
    assert sides[1] < larger  # a larger share adds, and takes nothing back
    assert set(train.split(0.6)[1].all_ids().tolist()) == larger - sides[1]  # a view is split, not what it shows
    for share in (0, 1, -0.5, 2.0, 1e-9):
        with pytest.raises(UserError, match="validation share"):
            dataset.split(share)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_one_sentence_from_any_worker(tmp_path: Path, workers: int) -> None:
    with DatasetWriter(tmp_path / "bad", "images", 10) as writer:
        writer.add("good", {"png": picture(0)})
        writer.add("broken", {"png": picture(1)[:-30]})
    with pytest.raises(UserError) as caught:
        list(sequential(ShardedDataset(tmp_path / "bad"), 1, canvas=CANVAS, workers=workers))
    assert "'broken'" in str(caught.value)
    assert "\n" not in str(caught.value)


def write_tokens(out: Path, shards: Iterable[np.ndarray], block: int, dtype: str) -> Path:
    """Text shards as the contract describes them: blocks of one length, the last of a shard shorter."""
    total = 0
    with DatasetWriter(out, "text", 10**9) as writer:
        for tokens in shards:
            for start in range(0, len(tokens), block):
                buffer = io.BytesIO()
                np.save(buffer, tokens[start : start + block].astype(dtype))
                writer.add(f"{total + start:08d}", {"npy": buffer.getvalue()})
            writer.close_shard(tokens=len(tokens))
            total += len(tokens)
        special = {"bos": 0, "eos": 1, "pad": 2, "mask": 3, "vocab_size": 100}
        writer.extra = {
            "dtype": dtype,
            "block_tokens": block,
            "documents": 1,
            "tokens": total,
            "bytes": total,
        } | special
    return out


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    block=st.integers(1, 40),
    context=st.integers(1, 50),
    dtype=st.sampled_from(["<u2", "<u4"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_rows_are_windows_of_the_token_stream(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], block: int, context: int, dtype: str, seed: int
) -> None:
    draw = np.random.Generator(np.random.Philox(seed))
    shards = [draw.integers(0, 20, length) for length in lengths]
    folder = write_tokens(tmp_path_factory.mktemp("tokens") / "t", shards, block, dtype)
    expected = [s[i : i + context + 1].tolist() for s in shards for i in range(0, len(s) - context, context)]
    if not expected:
        with pytest.raises(UserError, match=f"has {context + 1} tokens"):
            ShardedDataset(folder, context=context)
        return
    dataset = ShardedDataset(folder, context=context)
    assert len(dataset) == len(expected)
    batches = list(sequential(dataset, 3))
    assert [row for batch in batches for row in batch.tokens.tolist()] == expected
    # Documents rise by one at each begin-of-document token (0 here), and nowhere else.
    documents = [row for batch in batches for row in batch.documents.tolist()]
    assert documents == [np.cumsum(np.array(row) == 0).tolist() for row in expected]
    # A shuffled epoch holds the same rows.
    epoch = list(islice(Loader(dataset, 1, seed=seed), len(dataset)))
    assert sorted(b.ids.item() for b in epoch) == list(range(len(dataset)))
    assert all(batch.tokens[0].tolist() == expected[batch.ids.item()] for batch in epoch)


def test_text_needs_a_context(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "t", [np.arange(30)], 8, "<u2")
    for context in (None, 0, -3):
        with pytest.raises(UserError, match="tokens in a row"):
            ShardedDataset(folder, context=context)
    with pytest.raises(UserError, match="by document"):
        ShardedDataset(folder, context=4).split(0.5)


def test_a_cache_too_small_for_what_is_mixed_is_said_at_once(picture_shards: Path) -> None:
    dataset = ShardedDataset(picture_shards)
    dataset.storage.most_bytes = sum(shard["bytes"] for shard in dataset.manifest["shards"]) // 2
    with pytest.raises(UserError, match=r"8 shards takes .* set data\.shuffle_samples=12 or a larger"):
        next(iter(Loader(dataset, 4, canvas=CANVAS)))
