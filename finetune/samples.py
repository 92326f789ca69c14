"""Labelled samples in memory (or, where they would not fit, on disk), addressed by position."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.batch import ImageBatch, TextBatch
from data.canvas import CanvasDecoder
from data.images import UnreadableAt
from data.keyed import sample_keys
from finetune.encoder import Augmentation
from finetune.pictures import PictureSource, undecodable
from finetune.targets import Target
from finetune.targets_class import Classification
from finetune.text_encoder import DocumentEncoder

Ints = NDArray[np.int64]
_CHUNK = 256
MEMORY_GIB = 2.0
"""Decoded pictures above this stay on disk and are decoded again at each use."""


class Samples(ABC):
    """`n` labelled samples."""

    labels: Ints
    """(n,) class numbers; zeros where the task is no classification, so that splits and budgets treat all alike."""
    ids: Ints
    """(n,) numbers in the dataset they come from: the roots of their random keys."""
    target: Target
    """What is to be said about them."""
    values: Tensor | None = None
    """float32 (n, outputs) where the truth is a vector a sample."""

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batch(self, positions: Ints, keys: Tensor) -> Any:
        """The samples at `positions` (b,), with the random `keys` (b,)."""

    def truth(self, positions: Ints, keys: Tensor | None = None, augment: Augmentation | None = None) -> Tensor:
        """What `target` compares outputs with, for `batch(positions, keys)` under `augment`; see each target."""
        if self.values is not None:
            return self.values[torch.from_numpy(positions)]
        return torch.from_numpy(self.labels[positions])

    def select(self, positions: Ints) -> Self:
        """The samples at `positions`, sharing memory."""
        chosen = copy.copy(self)
        chosen.labels, chosen.ids = self.labels[positions], self.ids[positions]
        if self.values is not None:
            chosen.values = self.values[torch.from_numpy(positions)]
        return chosen

    def keys(self, seed: int, epochs: int | Ints, positions: Ints) -> Tensor:
        """Random keys of samples in epochs: int64 (b,)."""
        return torch.from_numpy(np.ascontiguousarray(sample_keys(seed, epochs, self.ids[positions])))

    def parts(self, size: int) -> list[Ints]:
        """The positions of every sample once, cut into batches that suit inference."""
        return np.split(self._order(), range(size, len(self), size))

    def batches(self, size: int) -> Iterator[tuple[Ints, Any]]:
        """Those batches: (positions, batch)."""
        for positions in self.parts(size):
            yield positions, self.batch(positions, self.keys(0, 0, positions))

    def _order(self) -> Ints:
        return np.arange(len(self), dtype=np.int64)


class ImageSamples(Samples):
    """Pictures of a sharded dataset or of files, decoded once into memory if they fit."""

    def __init__(
        self, dataset: PictureSource, ids: Ints, labels: Ints, canvas: int, target: Target | None = None
    ) -> None:
        """`canvas` is the side in pixels that larger pictures are shrunk to."""
        self.target = target or numbered(labels)
        self.dataset, self.ids, self.labels, self.canvas = dataset, ids, labels, canvas
        self._images: Tensor | None = None
        self._sizes = torch.empty(0)
        self._rows = np.empty(0, dtype=np.int64)

    @property
    def in_memory(self) -> bool:
        """Whether the pictures are decoded already."""
        return self._images is not None

    @property
    def gibibytes(self) -> float:
        """Memory that the decoded pictures take at most."""
        return len(self) * 3 * self.canvas**2 / 2**30

    def decode(self) -> None:
        """Decode every picture into memory, on a canvas no larger than the largest needs.

        Raises:
            DamagedData: pictures that cannot be decoded, with their number.
        """
        images = torch.empty(len(self), 3, self.canvas, self.canvas, dtype=torch.uint8)
        sizes = torch.empty(len(self), 2, dtype=torch.int64)
        damaged: list[tuple[int, str]] = []
        for start in range(0, len(self), _CHUNK):
            here = slice(start, min(start + _CHUNK, len(self)))
            images[here], sizes[here] = self._decoded(self.ids[here], damaged)
        if damaged:
            raise undecodable(self.dataset, damaged)
        side = int(sizes.max())
        self._images = images if side == self.canvas else images[:, :, :side, :side].clone()
        self._sizes, self._rows = sizes, np.arange(len(self), dtype=np.int64)

    def select(self, positions: Ints) -> Self:
        chosen = super().select(positions)
        chosen._rows = self._rows[positions] if self._images is not None else self._rows
        return chosen

    def batch(self, positions: Ints, keys: Tensor) -> ImageBatch:
        ids = torch.from_numpy(self.ids[positions])
        if self._images is None:
            damaged: list[tuple[int, str]] = []
            images, sizes = self._decoded(self.ids[positions], damaged)
            if damaged:
                raise undecodable(self.dataset, damaged)
        else:
            rows = torch.from_numpy(self._rows[positions])
            images, sizes = self._images[rows], self._sizes[rows]
        labels = torch.from_numpy(self.labels[positions])
        return ImageBatch(images=images, sizes=sizes, labels=labels, keys=keys, ids=ids)

    def _decoded(self, ids: Ints, damaged: list[tuple[int, str]]) -> tuple[Tensor, Tensor]:
        """Canvases and sizes; what cannot be decoded is added to `damaged` and left black."""
        payloads = self.dataset.pictures(ids)[0]
        decode, keys = CanvasDecoder(self.canvas), torch.empty(0)
        try:
            return decode(payloads, keys)
        except UnreadableAt:
            pass
        images = torch.zeros(len(ids), 3, self.canvas, self.canvas, dtype=torch.uint8)
        sizes = torch.ones(len(ids), 2, dtype=torch.int64)
        for place, payload in enumerate(payloads):
            try:
                images[place : place + 1], sizes[place : place + 1] = decode([payload], keys)
            except UnreadableAt as error:
                damaged.append((int(ids[place]), str(error)))
        return images, sizes


class TextSamples(Samples):
    """Texts as rows of token ids."""

    def __init__(
        self, rows: list[NDArray[np.int64]], labels: Ints, encoder: DocumentEncoder, target: Target | None = None
    ) -> None:
        """`rows` come from `encoder.tokenize`."""
        self.target = target or numbered(labels)
        self.rows, self.labels, self.encoder = rows, labels, encoder
        self.ids = np.arange(len(labels), dtype=np.int64)

    def batch(self, positions: Ints, keys: Tensor) -> TextBatch:
        ids = self.ids[positions]
        return self.encoder.batch([self.rows[i] for i in ids], keys, torch.from_numpy(ids))

    def _order(self) -> Ints:
        """Short to long, so that a batch holds little padding."""
        lengths = np.array([len(self.rows[i]) for i in self.ids])
        return np.argsort(lengths, kind="stable").astype(np.int64)


def numbered(labels: Ints) -> Classification:
    """Classes named by their numbers."""
    return Classification([str(number) for number in range(int(labels.max(initial=0)) + 1)])
