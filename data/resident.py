"""A dataset of pictures that fits in memory: decoded once, kept on the training device, batches cut out by id.

The batches hold the same bits as a `Loader`'s, in the same order, with the same substitutes for damaged samples.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.batch import ImageBatch
from data.canvas import CanvasDecoder
from data.damage import Mended, read_mended
from data.dataset import Ints
from data.errors import DamagedData, UserError
from data.images import UnreadableAt
from data.loader import Loader
from data.mixture import Samples
from data.requests import Requests

_CHUNK = 256
_MOST = 0.8
"""Share of the free memory that pictures may take."""


class Resident:
    """All pictures of a dataset, decoded onto canvases on one device."""

    def __init__(self, dataset: Samples, canvas: int, device: torch.device | str = "cpu", workers: int = 0) -> None:
        """Reads and decodes everything once, in `workers` processes.

        Raises:
            UserError: no pictures, or more than fit; a damaged one where the dataset tolerates none.
        """
        if dataset.kind != "images":
            raise UserError("only pictures can be kept in memory; leave out data.resident for text")
        self.dataset, self.device = dataset, torch.device(device)
        self._ids = dataset.all_ids()
        self._check_room(canvas)
        count = len(self._ids)
        # Interleaved, as a Loader's canvases are.
        self._pixels = torch.empty((count, canvas, canvas, 3), dtype=torch.uint8, device=self.device)
        self._sizes = torch.empty((count, 2), dtype=torch.int64, device=self.device)
        self._labels = torch.empty(count, dtype=torch.int64, device=self.device)
        self._damaged: dict[int, str] = {}
        starts = range(0, count, _CHUNK)
        chunks = [self._ids[start : start + _CHUNK] for start in starts]
        decoded = DataLoader(_Decoding(dataset, canvas, chunks), batch_size=None, num_workers=workers)
        for start, (images, sizes, labels, damaged) in zip(starts, decoded, strict=True):
            here = slice(start, start + len(images))
            self._pixels[here], self._sizes[here], self._labels[here] = images.permute(0, 2, 3, 1), sizes, labels
            self._damaged |= damaged
        if self._damaged and not dataset.tolerance:
            raise DamagedData(next(iter(self._damaged.values())))

    def read(self, ids: Ints, keys: Ints) -> ImageBatch:
        """The batch of these samples, on the device; raises `DamagedData` where one could not be decoded."""
        for identity in ids.tolist() if self._damaged else ():
            if identity in self._damaged:
                raise DamagedData(self._damaged[identity])
        rows = self._moved(np.searchsorted(self._ids, ids))
        return ImageBatch(
            images=self._pixels[rows].permute(0, 3, 1, 2),
            sizes=self._sizes[rows],
            labels=self._labels[rows],
            keys=self._moved(keys),
            ids=self._moved(ids),
        )

    def _moved(self, numbers: Ints) -> Tensor:
        tensor = torch.from_numpy(numbers)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _check_room(self, canvas: int) -> None:
        wanted, free = 3 * canvas * canvas * len(self._ids), _free_bytes(self.device)
        if wanted > _MOST * free:
            raise UserError(
                f"{len(self._ids):,} pictures of {canvas} x {canvas} take {wanted / 2**30:.1f} GiB of the "
                f"{free / 2**30:.1f} free on {self.device.type}; use data.resident=false or a smaller data.canvas"
            )


class ResidentLoader(Loader):
    """A `Loader` whose pictures are already decoded; its settings are the same, but for workers and canvas."""

    def __init__(self, resident: Resident, batch_size: Any, **settings: Any) -> None:
        super().__init__(resident.dataset, batch_size, canvas=1, **settings)
        self._loader = _Slices(resident, self._requests)


class _Slices:
    """Batches of a resident dataset, as requested."""

    def __init__(self, resident: Resident, requests: Requests) -> None:
        self.resident, self.requests = resident, requests

    def __iter__(self) -> Iterator[Mended]:
        resident = self.resident
        for request in self.requests:
            yield read_mended(resident.dataset, resident.read, request.ids, request.keys)


class _Decoding(Dataset[Any]):
    """Chunks of samples: canvases, sizes, labels, and what is wrong with those that are damaged."""

    def __init__(self, dataset: Samples, canvas: int, chunks: list[Ints]) -> None:
        self.dataset, self.decode, self.chunks = dataset, CanvasDecoder(canvas), chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, dict[int, str]]:
        ids = self.chunks[number]
        try:
            return *self._read(ids), {}
        except DamagedData:
            pieces, damaged = [], {}
            for identity in ids:
                try:
                    pieces.append(self._read(np.array([identity])))
                except DamagedData as error:
                    damaged[int(identity)] = str(error)
                    pieces.append(self._nothing())
            images, sizes, labels = (torch.cat(parts) for parts in zip(*pieces, strict=True))
            return images, sizes, labels, damaged

    def _read(self, ids: Ints) -> tuple[Tensor, Tensor, Tensor]:
        payloads, labels = self.dataset.pictures(ids)
        try:
            images, sizes = self.decode(payloads, torch.zeros(len(ids), dtype=torch.int64))
        except UnreadableAt as error:
            identity = int(ids[error.place])
            name, shard = self.dataset.key(identity), self.dataset.shard_name(identity)
            raise DamagedData(f"picture {name!r} in {shard} cannot be decoded: {error}") from None
        return images, sizes, torch.from_numpy(labels)

    def _nothing(self) -> tuple[Tensor, Tensor, Tensor]:
        side = self.decode.canvas
        nothing = torch.zeros((1, 3, side, side), dtype=torch.uint8)
        return nothing, torch.ones((1, 2), dtype=torch.int64), torch.full((1,), -1)


def _free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not told here
        return 2**63
