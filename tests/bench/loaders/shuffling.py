"""How well class-sorted shards are mixed, each loader at its defaults, by running its own shuffling code on labels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.order import Order
from loaders.table import table

Ints = NDArray[np.int64]
BATCH, SHARD = 256, 10_000


class Sorted(NamedTuple):
    """Samples sorted by class."""

    name: str
    classes: int
    samples: int
    sample_bytes: int


CASES = (
    Sorted("CIFAR-10's shape", 10, 50_000, 2_300),
    Sorted("ImageNet's shape", 1_000, 1_280_000, 110_000),
)


def compare() -> str:
    """Classes a batch, total variation from the whole set's classes, neighbours of one class; memory and time."""
    return "\n\n".join(_case(case) for case in CASES)


def _case(case: Sorted) -> str:
    makers: dict[str, Callable[[Sorted], Ints]] = {
        "i.i.d. (a random permutation)": _random,
        "headwater": _ours,
        "headwater, 4 lanes": lambda c: _ours(c, lanes=4),
        "headwater, shuffle_samples=2**18": lambda c: _ours(c, samples=2**18),
        "webdataset": _webdataset,
        "streaming (py1e)": _streaming,
    }
    labels = np.arange(case.samples) * case.classes // case.samples
    rows, iid = [], None
    for name, make in makers.items():
        began = time.perf_counter()
        order = make(case)
        seconds = time.perf_counter() - began
        assert np.array_equal(np.sort(order), np.arange(case.samples)), f"{name} repeats or misses samples"
        quality = _quality(labels[order], case.classes)
        iid = iid or quality
        cells = [f"{found:.2f} ({found / fair:.2f})" for found, fair in zip(quality, iid, strict=True)]
        rows.append([name, *cells, _memory(name, case), f"{seconds:.2f}"])
    head = ["order", "classes a batch (of i.i.d.)", "total variation (of i.i.d.)", "neighbours alike, % (of i.i.d.)"]
    caption = (
        f"**{case.name}: {case.samples:,} samples sorted into {case.classes} classes, batches of {BATCH}; tars of "
        f"{SHARD:,}, streaming's shards of 64 MiB**\n\n"
    )
    return caption + table([*head, "memory of the shuffle", "s an epoch"], rows)


def _quality(labels: Ints, classes: int) -> tuple[float, float, float]:
    batches = labels[: len(labels) // BATCH * BATCH].reshape(-1, BATCH)
    counts = np.stack([np.bincount(batch, minlength=classes) for batch in batches])
    distinct = (counts > 0).sum(axis=1).mean()
    variation = 0.5 * np.abs(counts / BATCH - 1 / classes).sum(axis=1).mean()
    return float(distinct), float(variation), float(100 * (labels[1:] == labels[:-1]).mean())


def _memory(name: str, case: Sorted) -> str:
    """Bytes that the shuffle holds, by what it stores."""
    if name.startswith("headwater"):
        order = Order(np.full(case.samples // SHARD, SHARD), 0, block_samples=2**18 if "2**18" in name else 2**20)
        order.locate([0])
        return f"{sum(block.permuted.nbytes for block in order._blocks.values()) / 2**20:.1f} MiB"
    if name == "webdataset":
        return f"{1000 * case.sample_bytes / 2**20:.1f} MiB (1,000 samples)"
    return f"{8 * case.samples / 2**20:.1f} MiB"


def _random(case: Sorted) -> Ints:
    return np.random.Generator(np.random.Philox(0)).permutation(case.samples)


def _ours(case: Sorted, lanes: int = 1, samples: int = 2**20) -> Ints:
    counts = np.full(case.samples // SHARD, SHARD)
    order = Order(counts, seed=0, block_samples=samples, lanes=lanes)
    step = 2**14
    parts = [order.locate(np.arange(at, min(at + step, case.samples))) for at in range(0, case.samples, step)]
    return np.concatenate([place.shards * SHARD + place.members for place in parts])


def _webdataset(case: Sorted) -> Ints:
    import random

    from webdataset.filters import _shuffle

    shards = list(range(case.samples // SHARD))
    random.Random(0).shuffle(shards)
    numbers = (shard * SHARD + member for shard in shards for member in range(SHARD))
    return np.fromiter(_shuffle(numbers, bufsize=1000, seed=0), dtype=np.int64, count=case.samples)


def _streaming(case: Sorted) -> Ints:
    from streaming.base.shuffle import get_shuffle

    size = max(1, 2**26 // case.sample_bytes)
    whole, rest = divmod(case.samples, size)
    sizes = np.array([size] * whole + [rest] * (rest > 0), dtype=np.int64)
    # The block that StreamingDataset takes by default on one node.
    return get_shuffle("py1e", sizes, 1, seed=0, epoch=0, block_size=max(4_000_000, 2**18))
