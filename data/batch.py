"""What the loader hands to the training device: plain tensors, nothing that remembers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor


class _Movable:
    """Moving, slicing and counting, shared by both kinds of batch."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same batch in page-locked host memory (asked for by `torch.utils.data.DataLoader`)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __getitem__(self, index: slice) -> Self:
        """A slice of the samples."""
        return self._map(lambda tensor: tensor[index])

    def __len__(self) -> int:
        """Number of samples."""
        return int(self.keys.shape[0])  # type: ignore[attr-defined]

    def _map(self, function: Any) -> Self:
        return type(self)(**{f.name: function(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


@dataclass
class ImageBatch(_Movable):
    """`b` decoded pictures, each at the top left of a square canvas that all of them share."""

    images: Tensor
    """uint8 (b, 3, canvas, canvas), RGB; zero outside each picture."""
    sizes: Tensor
    """int64 (b, 2): height and width of the picture on its canvas, in pixels."""
    labels: Tensor
    """int64 (b,): class number, -1 where the sample has none."""
    keys: Tensor
    """int64 (b,): the sample's random key, a hash of (seed, epoch, id); see `data.keyed`."""
    ids: Tensor
    """int64 (b,): the sample's number in its dataset, the same in every epoch."""


@dataclass
class TextBatch(_Movable):
    """`b` rows of `n` tokens, packed from consecutive documents."""

    tokens: Tensor
    """int64 (b, n): token ids."""
    documents: Tensor
    """int64 (b, n): number of the document within its row (0, 1, …); rises at each begin-of-document token."""
    keys: Tensor
    """int64 (b,): the row's random key, a hash of (seed, epoch, id); see `data.keyed`."""
    ids: Tensor
    """int64 (b,): the row's number in its dataset, the same in every epoch."""
