"""Do global batches depend on who reads them? 100 batches by one process and by two, and a change mid-epoch."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch import multiprocessing as mp

from data.dataset import ShardedDataset
from data.encoded import EncodedLoader
from data.loader import Loader
from loaders.sets import Pictures
from loaders.table import table

BATCHES, SIZE = 100, 64
NAMES = ("headwater", "webdataset", "litdata", "streaming")


def compare(pictures: Pictures) -> str:
    """Global batches (as sets of samples) that are equal at 1 and 2 processes; coverage after a change."""
    one = _read_by(pictures, 1)
    two = _read_by(pictures, 2)
    rows = []
    for name in NAMES:
        equal = sum(a == b for a, b in zip(one[name], two[name], strict=False))
        rows.append([name, f"{equal} of {BATCHES}"])
    caption = f"**{BATCHES} global batches of {SIZE}, equal at 1 and at 2 processes (gloo), as sets of samples**\n\n"
    return caption + table(["loader", "equal batches"], rows) + "\n\n" + _change(pictures)


def _read_by(pictures: Pictures, world: int) -> dict[str, list[Counter]]:
    """Each loader's global batches, joined over `world` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=_child, args=(pictures, r, world, port, results)) for r in range(world)]
    for process in processes:
        process.start()
    found = [json.loads(results.get()) for _ in processes]
    for process in processes:
        process.join()
    return {
        name: [
            sum((Counter(part) for part in parts), Counter()) for parts in zip(*(f[name] for f in found), strict=True)
        ]
        for name in NAMES
    }


def _child(pictures: Pictures, rank: int, world: int, port: int, results: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    found = {}
    for name in NAMES:
        samples = _samples(name, pictures, rank, world)
        local = SIZE // world
        found[name] = [list(islice(samples, local)) for _ in range(BATCHES)]
    results.put(json.dumps(found, default=str))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _samples(name: str, pictures: Pictures, rank: int, world: int) -> Iterator[Any]:
    """What identifies each sample of this process, in order."""
    if name == "headwater":
        for batch in EncodedLoader(ShardedDataset(pictures.shards), SIZE, rank=rank, world_size=world):
            yield from batch.ids.tolist()
    elif name == "webdataset":
        import webdataset as wds

        tars = sorted(str(path) for path in pictures.shards.glob("*.tar"))
        dataset = wds.WebDataset(tars, shardshuffle=100, nodesplitter=wds.split_by_node, seed=0)
        yield from (sample["__key__"] for sample in dataset.shuffle(1000, seed=0))
    elif name == "litdata":
        from litdata import StreamingDataset

        yield from (sample["name"] for sample in StreamingDataset(str(pictures.litdata), shuffle=True, drop_last=True))
    else:
        from streaming import StreamingDataset

        # The number of canonical nodes is fixed: what its documentation asks for to be elastic.
        arguments = {"shuffle": True, "batch_size": SIZE // world, "num_canonical_nodes": 1}
        yield from (int(sample["number"]) for sample in StreamingDataset(local=str(pictures.mds), **arguments))


def nothing(payloads: list[bytes], keys: Tensor) -> tuple[Tensor, Tensor]:
    """A decoder that leaves the bytes alone."""
    return torch.zeros((len(payloads), 3, 1, 1), dtype=torch.uint8), torch.ones((len(payloads), 2), dtype=torch.int64)


def _change(pictures: Pictures) -> str:
    """One epoch, the first part by two processes with two workers each, the rest by one without workers."""
    dataset = ShardedDataset(pictures.shards)
    size = 250
    steps = len(dataset) // size
    first = steps * 3 // 5
    seen: Counter = Counter()
    for rank in range(2):
        loader = Loader(dataset, size, rank=rank, world_size=2, workers=2, decode=nothing)
        for batch in islice(loader, first):
            seen.update(batch.ids.tolist())
        position = loader.position
    for batch in islice(Loader(dataset, size, start=position, decode=nothing), steps - first):
        seen.update(batch.ids.tolist())
    missed, repeated = len(dataset) - len(seen), sum(seen.values()) - len(seen)
    return (
        f"headwater, one epoch of {len(dataset):,}: {first} batches by 2 processes with 2 workers each, then "
        f"{steps - first} by 1 process without workers: {missed} missed, {repeated} repeated."
    )
