"""Features of a frozen encoder, each sample's computed once and only when a cell needs it."""

from __future__ import annotations

import time

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from finetune.encoder import Encoder
from finetune.features import extract
from finetune.samples import Ints, Samples
from finetune.settings import Settings


class FeatureBank:
    """One encoder's features of the training and the test samples."""

    def __init__(
        self, encoder: Encoder, train: Samples, test: Samples, settings: Settings, accelerator: Accelerator
    ) -> None:
        self.encoder, self.train, self.test = encoder, train, test
        self._settings, self._accelerator = settings, accelerator
        self._features, self._known = torch.empty(len(train), encoder.features), np.zeros(len(train), dtype=bool)
        self._judged: Tensor | None = None
        self._seconds, self._count = 0.0, 0

    def at(self, positions: Ints) -> Tensor:
        """Features of training samples, float32 (n, d)."""
        missing = positions[~self._known[positions]]
        if len(missing):
            self._features[torch.from_numpy(missing)] = self._extract(self.train.select(missing))
            self._known[missing] = True
        return self._features[torch.from_numpy(positions)]

    def of_test(self) -> Tensor:
        """Features of all test samples, float32 (m, d)."""
        if self._judged is None:
            self._judged = self._extract(self.test)
        return self._judged

    def missing(self, positions: Ints) -> int:
        """Samples that a cell at `positions` would have to pass through the encoder."""
        return int((~self._known[positions]).sum()) + (len(self.test) if self._judged is None else 0)

    @property
    def seconds_each(self) -> float | None:
        """Seconds a sample took, None before the first."""
        return self._seconds / self._count if self._count else None

    def _extract(self, samples: Samples) -> Tensor:
        started = time.perf_counter()
        features = extract(self.encoder, samples, self._settings, self._accelerator)
        self._seconds, self._count = self._seconds + time.perf_counter() - started, self._count + len(samples)
        return features
