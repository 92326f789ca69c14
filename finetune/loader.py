"""Labelled samples as the training loop reads them: by position, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from data.keyed import hash64
from data.requests import Share
from finetune.encoder import Augmentation
from finetune.samples import Ints, Samples


@dataclass
class Labelled:
    """A batch and what is to be said about it."""

    batch: Any
    """`ImageBatch` or `TextBatch`."""
    truth: Tensor
    """See `finetune.targets`."""

    @property
    def ids(self) -> Tensor:
        """int64 (b,)."""
        ids: Tensor = self.batch.ids
        return ids

    @property
    def keys(self) -> Tensor:
        """int64 (b,)."""
        keys: Tensor = self.batch.keys
        return keys

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on `device`."""
        batch = self.batch.to(device, non_blocking=non_blocking)
        return type(self)(batch, self.truth.to(device, non_blocking=non_blocking))

    def __len__(self) -> int:
        return len(self.truth)


class SampleLoader:
    """This process's share of endless global batches of `samples`, each epoch in a keyed order of its own.

    Keeps the contract of `data.loader.Loader`: its whole state is `position`, the samples that all processes
    together have consumed, and the global batches are the same for any number of processes.
    """

    tolerance = 0

    def __init__(
        self, samples: Samples, batch_size: int, seed: int, share: Share, augment: Augmentation | None = None
    ) -> None:
        """`augment` is what the truth of augmented samples depends on. Raises `UserError` for an uneven split."""
        share.check(batch_size)
        self.samples, self.batch_size, self.seed, self.share = samples, batch_size, seed, share
        self.augment, self.position = augment, 0

    def __iter__(self) -> Iterator[Labelled]:
        """Microbatches, for ever, from `position` on."""
        step = self.share.microbatch(self.batch_size)
        position = self.position
        while True:
            places = self.share.positions(position, self.batch_size)
            epochs, positions = self.locate(places)
            keys = self.samples.keys(self.seed, epochs, positions)
            for first in range(0, len(places), step):
                part = slice(first, first + step)
                labelled = self.read(positions[part], keys[part])
                if first + step == len(places):
                    position += self.batch_size
                    self.position = position
                yield labelled

    def locate(self, places: Ints) -> tuple[Ints, Ints]:
        """Epochs and positions among the samples of `places`, counted since training began; int64, as `places`."""
        count = len(self.samples)
        epochs, ranks = places // count, places % count
        positions = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            positions[here] = keyed_order(count, self.seed, int(epoch))[ranks[here]]
        return epochs, positions

    def take_damage(self) -> tuple[int, list[str]]:
        """None: samples in memory are whole."""
        return 0, []

    def read(self, positions: Ints, keys: Tensor) -> Labelled:
        """The samples at `positions` with their truth; `keys` are their random ones."""
        return Labelled(self.samples.batch(positions, keys), self.samples.truth(positions, keys, self.augment))


@lru_cache(maxsize=4)
def keyed_order(count: int, seed: int, epoch: int) -> Ints:
    """A random order of `count` samples, int64 (count,); shared, not to be written to."""
    return np.argsort(hash64(seed, epoch, np.arange(count)), kind="stable").astype(np.int64)
