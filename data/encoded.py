"""Batches of encoded pictures, as bytes: what lies below `Loader`, for decoders and pipelines of one's own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

from data.dataset import Ints
from data.errors import UserError
from data.mixture import Samples
from data.order import BLOCK_SAMPLES
from data.requests import Request, Requests, Share


class EncodedBatch(NamedTuple):
    """`b` samples as they lie in their tars."""

    payloads: list[bytes]
    """The encoded pictures, checked against their index."""
    labels: Ints
    """int64 (b,): class number, -1 where the sample has none."""
    keys: Ints
    """int64 (b,): the sample's random key, a hash of (seed, epoch, id); see `data.keyed`."""
    ids: Ints
    """int64 (b,): the sample's number in its dataset, the same in every epoch."""


class EncodedLoader:
    """An endless stream of this process's share of the global batches, not decoded.

    The batches, their order and `position` are those of a `Loader` of the same arguments. `workers` are threads,
    not processes: reading leaves Python's lock free, and bytes need not be carried from one process to another.
    """

    def __init__(
        self,
        dataset: Samples,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        workers: int = 0,
        lanes: int = 1,
        shuffle_samples: int = BLOCK_SAMPLES,
    ) -> None:
        """Raises `UserError` when the global batch cannot be split evenly, or the dataset holds text."""
        if dataset.kind != "images":
            raise UserError(f"{dataset.folder} holds {dataset.kind}, which is read in rows; use a Loader")
        share = Share(rank, world_size, None, lanes, shuffle_samples)
        share.check(batch_size)
        self.dataset, self.batch_size, self.position, self.workers = dataset, batch_size, start, workers
        self._requests = Requests(dataset, share, lambda _: batch_size, seed, start)

    def __iter__(self) -> Iterator[EncodedBatch]:
        """Yields batches, for ever, from `position` on."""
        self._requests.start, self._requests.ends = self.position, deque()
        for batch in self._ahead() if self.workers else map(_Reader(self.dataset), self._requests):
            self.position += self.batch_size
            yield batch

    def _ahead(self) -> Iterator[EncodedBatch]:
        """Batches in order, read by threads two batches a thread ahead."""
        requests, waiting = iter(self._requests), deque[Future[EncodedBatch]]()
        own = threading.local()

        def begin() -> None:
            own.reader = _Reader(self.dataset.copy())

        def read(request: Request) -> EncodedBatch:
            return own.reader(request)

        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="headwater-read", initializer=begin)
        try:
            for request in islice(requests, 2 * self.workers):
                waiting.append(pool.submit(read, request))
            while True:
                yield waiting.popleft().result()
                waiting.append(pool.submit(read, next(requests)))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class _Reader:
    def __init__(self, dataset: Samples) -> None:
        self.dataset = dataset

    def __call__(self, request: Request) -> EncodedBatch:
        return EncodedBatch(*self.dataset.pictures(request.ids), request.keys, request.ids)
