"""Time to the first batch: from cold, and deep in an epoch; and whether it is the right batch."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from itertools import islice
from statistics import median
from typing import Any

import torchvision
from torch.utils.data import DataLoader

from data.dataset import ShardedDataset
from data.encoded import EncodedLoader
from loaders.sets import Pictures
from loaders.table import table

SIZE, DEEP, ROUNDS = 256, 98, 5
FAR = 3_000_000_000
Start = Callable[[Pictures, int, Any], Iterator[list[bytes]]]


def compare(pictures: Pictures) -> str:
    """Seconds to the first batch at position 0 and at batch 98, in-process; the median of five rounds."""
    found: dict[str, tuple[list[float], list[float], bool]] = {}
    for name, (start, state_at) in _RESUMED.items():
        state, straight = state_at(pictures)
        cold, deep, right = [], [], True
        for _ in range(ROUNDS):
            cold.append(_first(lambda s=start: s(pictures, 0, None))[0])
            seconds, batch = _first(lambda s=start, state=state: s(pictures, DEEP, state))
            deep.append(seconds)
            right &= sorted(map(bytes, batch)) == sorted(map(bytes, straight))
        found[name] = (cold, deep, right)
    rows = [
        [name, f"{1000 * median(cold):.0f}", f"{1000 * median(deep):.0f}", f"{median(deep) / median(cold):.2f}×", ok]
        for name, (cold, deep, right) in found.items()
        for ok in ["yes" if right else "no"]
    ]
    far = median(_first(lambda: _ours(pictures, FAR // SIZE, None))[0] for _ in range(ROUNDS))
    caption = f"**First batch of {SIZE} at the start and {DEEP * SIZE:,} samples deep, in-process, bytes only**\n\n"
    head = ["loader", "cold, ms", "deep, ms", "deep / cold", "the batch of the straight run"]
    return caption + table(head, rows) + f"\n\nheadwater at sample {FAR:,}: {1000 * far:.0f} ms."


def _first(start: Callable[[], Iterator[list[bytes]]]) -> tuple[float, list[bytes]]:
    gc.collect()
    began = time.perf_counter()
    batches = start()
    batch = next(batches)
    return time.perf_counter() - began, batch


def _ours(pictures: Pictures, skip: int, state: Any) -> Iterator[list[bytes]]:
    loader = EncodedLoader(ShardedDataset(pictures.shards), SIZE, start=skip * SIZE)
    return (batch.payloads for batch in loader)


def _webdataset(pictures: Pictures, skip: int, state: Any) -> Iterator[list[bytes]]:
    """It has no position: what it read must be read again."""
    import webdataset as wds

    tars = sorted(str(path) for path in pictures.shards.glob("*.tar"))
    dataset = wds.WebDataset(tars, shardshuffle=100).shuffle(1000).map(lambda s: s["jpg"])
    return islice(iter(dataset.batched(SIZE, collation_fn=list)), skip, None)


def _litdata(pictures: Pictures, skip: int, state: Any) -> Iterator[list[bytes]]:
    return iter(_litdata_loader(pictures, state))


def _litdata_loader(pictures: Pictures, state: Any) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(pictures.litdata), shuffle=True, drop_last=True)
    loader = StreamingDataLoader(dataset, batch_size=SIZE, num_workers=0, collate_fn=_payloads)
    if state is not None:
        loader.load_state_dict(state)
    return loader


def _streaming(pictures: Pictures, skip: int, state: Any) -> Iterator[list[bytes]]:
    return (batch["jpg"] for batch in _streaming_loader(pictures, state))


def _streaming_loader(pictures: Pictures, state: Any) -> Any:
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(pictures.mds), shuffle=True, batch_size=SIZE)
    # It counts samples by the first value of a mapping.
    loader = StreamingDataLoader(
        dataset, batch_size=SIZE, num_workers=0, collate_fn=lambda samples: {"jpg": _payloads(samples)}
    )
    if state is not None:
        loader.load_state_dict(state)
    return loader


def _image_folder(pictures: Pictures, skip: int, state: Any) -> Iterator[list[bytes]]:
    """Under accelerate's `skip_first_batches`; the order is not saved by anybody."""
    from accelerate import skip_first_batches

    dataset = torchvision.datasets.ImageFolder(str(pictures.files), loader=_read)
    loader = DataLoader(dataset, SIZE, shuffle=True, collate_fn=lambda samples: [payload for payload, _ in samples])
    return iter(skip_first_batches(loader, skip) if skip else loader)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _payloads(samples: list[dict[str, Any]]) -> list[bytes]:
    return [sample["jpg"] for sample in samples]


def _by_reading(start: Start) -> Callable[[Pictures], tuple[Any, list[bytes]]]:
    return lambda pictures: (None, next(islice(start(pictures, 0, None), DEEP, None)))


def _by_state(make: Callable[[Pictures, Any], Any]) -> Callable[[Pictures], tuple[Any, list[bytes]]]:
    def after(pictures: Pictures) -> tuple[Any, list[bytes]]:
        loader = make(pictures, None)
        batches = iter(loader)
        for _ in range(DEEP):
            next(batches)
        state, batch = loader.state_dict(), next(batches)
        return state, batch["jpg"] if isinstance(batch, dict) else batch

    return after


_RESUMED: dict[str, tuple[Start, Callable[[Pictures], tuple[Any, list[bytes]]]]] = {
    "headwater": (_ours, _by_reading(_ours)),
    "webdataset (reads again)": (_webdataset, _by_reading(_webdataset)),
    "litdata": (_litdata, _by_state(_litdata_loader)),
    "streaming": (_streaming, _by_state(_streaming_loader)),
    "ImageFolder (skip_first_batches)": (_image_folder, _by_reading(_image_folder)),
}
