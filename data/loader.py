"""Batches by position: the loader's whole state is one integer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.batch import ImageBatch, TextBatch
from data.damage import Mended, read_mended
from data.dataset import Ints, ShardedDataset
from data.errors import DamagedData, UserError
from data.images import UnreadableImage, decode
from data.keyed import sample_keys
from data.order import Order

_MOST_REPORTS = 20


class _Request(NamedTuple):
    """One microbatch, as the main process asks a worker for it."""

    ids: Ints
    keys: Ints


class Loader:
    """An endless stream of this process's share of the global batches.

    Global batch `k` is positions `k * batch_size … (k + 1) * batch_size - 1` of the dataset's order,
    whatever the number of processes and workers; process `rank` takes the `rank`-th of `world_size`
    equal pieces, in microbatches. `position` counts the samples consumed by all processes together:
    a loader made with `start=position` goes on with the next global batch.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        workers: int = 0,
        canvas: int | None = None,
        microbatch: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        """Raises `UserError` when the global batch cannot be split evenly.

        Args:
            batch_size: samples of one global batch, over all processes.
            start: position of the first sample, any number from 0.
            canvas: side of the square that pictures are placed on, in pixels (images only).
            microbatch: most samples a yielded batch may hold; this process's whole share without it.
        """
        if batch_size < 1 or (microbatch is not None and microbatch < 1):
            raise UserError(f"a batch of {batch_size} and a microbatch of {microbatch} samples: use at least 1 each")
        if batch_size % world_size:
            nearest = max(1, round(batch_size / world_size)) * world_size
            raise UserError(
                f"a global batch of {batch_size} cannot be split evenly over {world_size} processes; "
                f"use {nearest} (train.batch_size={nearest}) or another number of processes"
            )
        local = batch_size // world_size
        self.microbatch = local if microbatch is None else min(microbatch, local)
        if local % self.microbatch:
            raise UserError(
                f"{local} samples a process cannot be split into microbatches of {self.microbatch}; "
                f"choose a divisor of {local} (train.microbatch)"
            )
        self.accumulation = local // self.microbatch
        """Microbatches of one global batch on this process."""
        self.batch_size, self.position = batch_size, start
        self.damaged: int = 0
        """Damaged samples that this process has replaced (see `data.damage`); never more than the dataset tolerates."""
        self._tolerance = dataset.tolerance
        self._untold: tuple[int, list[str]] = (0, [])
        self._requests = _Requests(dataset, batch_size, seed, rank * local, local, self.microbatch, start)
        self._loader = _torch_loader(dataset, self._requests, workers, canvas, pin_memory)

    def __iter__(self) -> Iterator[Any]:
        """Yields `ImageBatch` or `TextBatch` microbatches, for ever, from `position` on."""
        self._requests.start = self.position
        for number, mended in enumerate(_whole(self._loader)):
            self._count(mended.reports)
            if (number + 1) % self.accumulation == 0:
                self.position += self.batch_size
            yield mended.batch

    def take_damage(self) -> tuple[int, list[str]]:
        """How many damaged samples were replaced since the last call, and what was wrong with the first of them."""
        told, self._untold = self._untold, (0, [])
        return told

    def _count(self, reports: tuple[str, ...]) -> None:
        if not reports:
            return
        self.damaged += len(reports)
        count, sentences = self._untold
        self._untold = count + len(reports), (sentences + list(reports))[:_MOST_REPORTS]
        if self.damaged > self._tolerance:
            raise DamagedData(
                f"{self.damaged} damaged samples are more than the {self._tolerance} that are tolerated "
                f"(data.damaged); the last: {reports[-1]}"
            )


def sequential(
    dataset: ShardedDataset,
    batch_size: int,
    canvas: int | None = None,
    workers: int = 0,
    ids: Ints | None = None,
    seed: int = 0,
) -> Iterator[Any]:
    """One pass over the samples `ids` (all, ascending, by default); the last batch may be smaller."""
    ids = dataset.all_ids() if ids is None else np.asarray(ids, dtype=np.int64)
    requests = [
        _Request(part, sample_keys(seed, 0, part))
        for part in np.split(ids, range(batch_size, len(ids), batch_size))
        if len(part)
    ]
    for mended in _whole(_torch_loader(dataset, requests, workers, canvas, pin_memory=False)):
        yield mended.batch


class _Requests(Sampler[_Request]):
    """Positions to samples, in the main process, so that workers cannot change the order."""

    def __init__(
        self,
        dataset: ShardedDataset,
        batch_size: int,
        seed: int,
        offset: int,
        local: int,
        microbatch: int,
        start: int,
    ) -> None:
        self.dataset, self.order, self.seed = dataset, Order(dataset.counts, seed), seed
        self.batch_size, self.offset, self.local, self.microbatch = batch_size, offset, local, microbatch
        self.start = start

    def __iter__(self) -> Iterator[_Request]:
        batch, announced = self.start, np.empty(0, dtype=np.int64)
        while True:
            upcoming = self.order.upcoming(batch)
            if not np.array_equal(upcoming, announced):
                self.dataset.storage.ahead(upcoming.tolist())
                announced = upcoming
            for first in range(self.offset, self.offset + self.local, self.microbatch):
                place = self.order.locate(np.arange(batch + first, batch + first + self.microbatch))
                ids = self.dataset.ids(place.shards, place.members)
                yield _Request(ids, sample_keys(self.seed, place.epochs, ids))
            batch += self.batch_size


class _Reader(Dataset[Any]):
    """Reads and decodes one request; runs in a worker process, or in the main one without workers."""

    def __init__(self, dataset: ShardedDataset, canvas: int | None) -> None:
        self.dataset, self.canvas = dataset, canvas

    def __getitem__(self, request: _Request) -> Mended | UserError:
        # Returned, not raised: torch would bury the sentence in the worker's traceback.
        try:
            return read_mended(self.dataset, self._read, request.ids, request.keys)
        except UserError as error:
            return error

    def _read(self, identities: Ints, sample_keys: Ints) -> ImageBatch | TextBatch:
        keys, ids = torch.from_numpy(sample_keys), torch.from_numpy(identities)
        if self.dataset.kind == "text":
            tokens = torch.from_numpy(np.stack([self.dataset.row(int(i)) for i in identities]))
            documents = torch.cumsum(tokens == self.dataset.manifest["bos"], dim=1)
            return TextBatch(tokens=tokens, documents=documents, keys=keys, ids=ids)
        canvas, labels, sizes = self.canvas, [], []
        assert canvas is not None
        pixels = np.empty((len(ids), 3, canvas, canvas), dtype=np.uint8)
        for place, identity in enumerate(identities):
            payload, label = self.dataset.image(int(identity))
            try:
                pixels[place], size = decode(payload, canvas)
            except UnreadableImage as error:
                name = self.dataset.key(int(identity))
                shard = self.dataset.paths[self.dataset.shard(int(identity))]
                raise DamagedData(f"picture {name!r} in {shard} cannot be decoded: {error}") from None
            labels.append(label)
            sizes.append(size)
        return ImageBatch(
            images=torch.from_numpy(pixels),
            sizes=torch.tensor(sizes, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            keys=keys,
            ids=ids,
        )


def _whole(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, up to the first that could not be read."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _torch_loader(
    dataset: ShardedDataset, requests: Any, workers: int, canvas: int | None, pin_memory: bool
) -> DataLoader:
    if dataset.kind == "images" and canvas is None:
        raise UserError("images need a canvas: the side, in pixels, of the square they are decoded onto")
    return DataLoader(
        _Reader(dataset, canvas),
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        # Its own generator: the default one would be drawn from at every pass.
        generator=torch.Generator().manual_seed(0),
    )
