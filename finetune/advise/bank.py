"""Features of a frozen encoder, each sample's computed once, only when a cell needs it, and kept through a kill."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from data.files import write_atomically
from finetune.advise.clock import OutOfTime
from finetune.encoder import Encoder
from finetune.features import extract
from finetune.samples import Ints, Samples
from finetune.settings import Settings

CHUNK = 2048
"""Samples extracted at once: what a stop in between can lose."""
OFTEN = 30.0
"""Seconds between writing what there is to disk."""


class FeatureBank:
    """One encoder's features of the training and then of the test samples."""

    def __init__(
        self,
        encoder: Encoder,
        train: Samples,
        test: Samples,
        settings: Settings,
        accelerator: Accelerator,
        path: Path | None = None,
    ) -> None:
        """`path` is a file of a former start to go on from, and to write; nothing is written without it."""
        self.encoder, self._sides = encoder, (train, test)
        self._settings, self._accelerator, self._path = settings, accelerator, path
        count = len(train) + len(test)
        self._features, self._known = torch.zeros(count, encoder.features), torch.zeros(count, dtype=torch.bool)
        self._seconds, self._count = 0.0, 0
        if path is not None and path.exists():
            self._load(path)

    def at(self, positions: Ints) -> Tensor:
        """Features of training samples, float32 (n, d)."""
        return self._get(0, positions)

    def of_test(self) -> Tensor:
        """Features of all test samples, float32 (m, d)."""
        return self._get(1, self._test)

    def of(self, samples: Samples) -> Tensor:
        """Features of some of the training samples, float32 (n, d)."""
        ids = self._sides[0].ids
        order = np.argsort(ids, kind="stable")
        return self.at(order[np.searchsorted(ids, samples.ids, sorter=order)])

    def missing(self, positions: Ints) -> int:
        """Samples that a cell at `positions` would have to pass through the encoder."""
        rows = np.concatenate([positions, self._test + len(self._sides[0])])
        return int((~self._known[torch.from_numpy(rows)]).sum())

    @property
    def seconds_each(self) -> float | None:
        """Seconds a sample took, None before the first."""
        return self._seconds / self._count if self._count else None

    @property
    def _test(self) -> Ints:
        return np.arange(len(self._sides[1]), dtype=np.int64)

    def _get(self, side: int, positions: Ints) -> Tensor:
        rows = torch.from_numpy(positions + side * len(self._sides[0]))
        missing = positions[~self._known[rows].numpy()]
        saved = time.perf_counter()
        try:
            for chunk in np.split(missing, range(CHUNK, len(missing), CHUNK)):
                self._extract(side, chunk)
                if time.perf_counter() - saved > OFTEN:
                    self._save()
                    saved = time.perf_counter()
        except OutOfTime:
            self._save()
            raise
        if len(missing) >= CHUNK:
            self._save()
        return self._features[rows]

    def _extract(self, side: int, positions: Ints) -> None:
        if not len(positions):
            return
        started = time.perf_counter()
        samples = self._sides[side].select(positions)
        rows = torch.from_numpy(positions + side * len(self._sides[0]))
        self._features[rows] = extract(self.encoder, samples, self._settings, self._accelerator)
        self._known[rows] = True
        self._seconds, self._count = self._seconds + time.perf_counter() - started, self._count + len(positions)

    def _save(self) -> None:
        if self._path is not None:
            rate = torch.tensor([self._seconds, float(self._count)], dtype=torch.float64)
            self._path.parent.mkdir(exist_ok=True)
            tensors = {"features": self._features, "known": self._known, "rate": rate}
            write_atomically(self._path, save(tensors))

    def _load(self, path: Path) -> None:
        """What a former start left; a file that does not fit is passed over."""
        try:
            found = load_file(path)
            if found["features"].shape != self._features.shape:
                return
            self._features, self._known = found["features"], found["known"]
            self._seconds, self._count = float(found["rate"][0]), int(found["rate"][1])
        except (SafetensorError, KeyError):
            return
