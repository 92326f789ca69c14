"""Batches by position: the loader's whole state is one integer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.batch import ImageBatch, TextBatch
from data.canvas import CanvasDecoder
from data.damage import Mended, read_mended
from data.dataset import Ints
from data.errors import DamagedData, UserError
from data.images import UnreadableAt
from data.keyed import sample_keys
from data.mixture import Samples
from data.order import BLOCK_SAMPLES
from data.requests import Request, Requests, Share

_MOST_REPORTS = 20


class Decoder(Protocol):
    """Turns the encoded pictures of a batch into pixels; picklable, and run in a worker."""

    def __call__(self, payloads: list[bytes], keys: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 pictures (b, 3, height, width) and int64 (b, 2) sizes; raises `UnreadableAt`."""


class Loader:
    """An endless stream of this process's share of the global batches.

    A global batch is the next `batch_size` positions of the dataset's order, whatever the number of processes
    and workers; process `rank` takes the `rank`-th of `world_size` equal pieces, in microbatches. `position`
    counts the samples consumed by all processes together: a loader made with `start=position` goes on with the
    next global batch.
    """

    def __init__(
        self,
        dataset: Samples,
        batch_size: int | Callable[[int], int],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        workers: int = 0,
        canvas: int | None = None,
        microbatch: int | None = None,
        pin_memory: bool = False,
        lanes: int = 1,
        shuffle_samples: int = BLOCK_SAMPLES,
        decode: Decoder | None = None,
    ) -> None:
        """Raises `UserError` when the global batch cannot be split evenly.

        Args:
            batch_size: samples of one global batch, over all processes; or a pure function from the position at
                which a batch begins to its size, for a batch that grows. The attributes `batch_size` and
                `accumulation` are then those of the batch that comes next.
            start: position of the first sample, any number from 0.
            canvas: side of the square that pictures are placed on, in pixels (images only).
            microbatch: most samples a yielded batch may hold; this process's whole share without it.
            lanes: pieces of the shards that are read side by side; with a multiple of the number of nodes, each
                node reads about its share of the shards. Divides the batch size. Part of what the order is.
            shuffle_samples: samples that are mixed at least (see `data.order`); part of what the order is.
            decode: what to make of the encoded pictures, instead of placing them on a `canvas`.
        """
        self.share = Share(rank, world_size, microbatch, lanes, shuffle_samples)
        self._size_at = batch_size if callable(batch_size) else None
        self._size = 0 if callable(batch_size) else batch_size
        self.position = start
        self.share.check(self.batch_size)
        self.damaged: int = 0
        """Damaged samples that this process has replaced (see `data.damage`); never more than the dataset tolerates."""
        self.tolerance: int = dataset.tolerance
        """Damaged samples that may be replaced."""
        self._untold: tuple[int, list[str]] = (0, [])
        self._requests = Requests(dataset, self.share, self._sizes, seed, start)
        if dataset.kind == "images" and canvas is None and decode is None:
            raise UserError("images need a canvas: the side, in pixels, of the square they are decoded onto")
        if decode is None and canvas is not None:
            decode = CanvasDecoder(canvas)
        self._loader: Iterable[Any] = _torch_loader(dataset, self._requests, workers, decode, pin_memory)

    @property
    def batch_size(self) -> int:
        """Samples of the next global batch."""
        return self._sizes(self.position)

    @property
    def microbatch(self) -> int:
        """Samples of each batch that is yielded for the next global batch."""
        return self.share.microbatch(self.batch_size)

    @property
    def accumulation(self) -> int:
        """Microbatches of the next global batch on this process."""
        return self.batch_size // self.share.world_size // self.microbatch

    def __iter__(self) -> Iterator[Any]:
        """Yields `ImageBatch` or `TextBatch` microbatches, for ever, from `position` on."""
        self._requests.start = self.position
        ends: deque[int | None] = deque()
        self._requests.ends = ends
        for mended in _whole(self._loader):
            self._count(mended.reports)
            end = ends.popleft()
            if end is not None:
                self.position = end
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
        if self.damaged > self.tolerance:
            raise DamagedData(
                f"{self.damaged} damaged samples are more than the {self.tolerance} that are tolerated "
                f"(data.damaged); the last: {reports[-1]}"
            )

    def _sizes(self, position: int) -> int:
        return self._size if self._size_at is None else self._size_at(position)


def sequential(
    dataset: Samples,
    batch_size: int,
    canvas: int | None = None,
    workers: int = 0,
    ids: Ints | None = None,
    seed: int = 0,
    decode: Decoder | None = None,
) -> Iterator[Any]:
    """One pass over the samples `ids` (all, ascending, by default); the last batch may be smaller."""
    ids = dataset.all_ids() if ids is None else np.asarray(ids, dtype=np.int64)
    if dataset.kind == "images" and decode is None:
        if canvas is None:
            raise UserError("images need a canvas: the side, in pixels, of the square they are decoded onto")
        decode = CanvasDecoder(canvas)
    parts = [ids[first : first + batch_size] for first in range(0, len(ids), batch_size)]
    requests = [Request(part, sample_keys(seed, 0, part)) for part in parts]
    for mended in _whole(_torch_loader(dataset, requests, workers, decode, pin_memory=False)):
        yield mended.batch


@dataclass
class _Sent:
    """A batch on its way from a worker: few tensors, as each costs a file descriptor; arrays are pickled."""

    kind: type[ImageBatch] | type[TextBatch]
    bulk: Tensor
    arrays: dict[str, Any]
    reports: tuple[str, ...]

    @classmethod
    def of(cls, mended: Mended) -> Self:
        """Pack a batch: its first field is the large one."""
        batch = mended.batch
        first, *rest = [field.name for field in fields(batch)]
        arrays = {name: getattr(batch, name).numpy() for name in rest}
        return cls(type(batch), getattr(batch, first), arrays, mended.reports)

    def unpack(self) -> Mended:
        """The batch as it was."""
        arrays = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        return Mended(self.kind(self.bulk, **arrays), self.reports)

    def pin_memory(self) -> Mended:
        """The batch in page-locked host memory (asked for by `torch.utils.data.DataLoader`)."""
        mended = self.unpack()
        return Mended(mended.batch.pin_memory(), mended.reports)


class _Reader(Dataset[Any]):
    """Reads and decodes one request; runs in a worker process, or in the main one without workers."""

    def __init__(self, dataset: Samples, decode: Decoder | None) -> None:
        self.dataset, self.decode = dataset, decode

    def __getitem__(self, request: Request) -> _Sent | UserError:
        # Returned, not raised: torch would bury the sentence in the worker's traceback.
        try:
            return _Sent.of(read_mended(self.dataset, self._read, request.ids, request.keys))
        except UserError as error:
            return error

    def _read(self, ids: Ints, keys: Ints) -> ImageBatch | TextBatch:
        numbers = {"keys": torch.from_numpy(keys), "ids": torch.from_numpy(ids)}
        if self.dataset.kind == "text":
            tokens = torch.from_numpy(self.dataset.rows(ids))
            documents = torch.cumsum(tokens == self.dataset.manifest["bos"], dim=1)
            return TextBatch(tokens=tokens, documents=documents, **numbers)
        payloads, labels = self.dataset.pictures(ids)
        assert self.decode is not None
        try:
            images, sizes = self.decode(payloads, numbers["keys"])
        except UnreadableAt as error:
            damaged = int(ids[error.place])
            name, shard = self.dataset.key(damaged), self.dataset.shard_name(damaged)
            raise DamagedData(f"picture {name!r} in {shard} cannot be decoded: {error}") from None
        return ImageBatch(images=images, sizes=sizes, labels=torch.from_numpy(labels), **numbers)


def _whole(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, up to the first that could not be read."""
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch.unpack() if isinstance(batch, _Sent) else batch


def _torch_loader(
    dataset: Samples, requests: Any, workers: int, decode: Decoder | None, pin_memory: bool
) -> DataLoader:
    return DataLoader(
        _Reader(dataset, decode),
        sampler=requests,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        # Its own generator: the default one would be drawn from at every pass.
        generator=torch.Generator().manual_seed(0),
    )
