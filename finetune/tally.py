"""What one voice says of labelled items, collected part by part."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from finetune.compare import Judged, JudgedTarget, judged
from finetune.judge import Judgement
from finetune.samples import Ints
from finetune.targets import Floats, Target


class Tally:
    """Counts, a loss, and the decisions where they are small or asked for: memory holds no distribution of pixels."""

    def __init__(self, target: Target, count: int, keep: bool = False) -> None:
        """Of `count` items; `keep` every word's or pixel's decision, too."""
        self.target, self.keep = target, keep or not target.dense
        self._decided = [torch.empty(0)] * (count if self.keep else 0)
        self._truth = list(self._decided)
        self._sums: list[tuple[Ints, Floats]] = []
        self._loss, self._places = 0.0, 0

    def add(self, positions: Ints, said: Tensor, truth: Tensor) -> None:
        """A `distribution` of the items at `positions`, and what is true of them, both on one device."""
        mismatch = self.target.mismatch(said, truth)
        self._loss, self._places = self._loss + float(mismatch.sum()), self._places + len(mismatch)
        decided, truth = self.target.decision(said).cpu(), truth.cpu()
        if not self.keep:
            self._sums.append((positions, self.target.sums(list(decided), list(truth))))
            return
        for place, said_here, true in zip(positions, decided, truth, strict=True):
            self._decided[place], self._truth[place] = said_here, true

    @property
    def loss(self) -> float:
        """Mean of `Target.mismatch`."""
        return self._loss / self._places if self._places else float("nan")

    def judgement(self) -> Judgement:
        """Everything that was decided, where it was kept."""
        assert self.keep
        return Judgement(self.target, self._decided, self._truth, self.loss)

    def judged(self, name: str) -> Judged:
        """As it is compared."""
        if self.keep:
            return judged(name, self.judgement())
        order = np.concatenate([positions for positions, _ in self._sums])
        sums = np.concatenate([part for _, part in self._sums])[np.argsort(order)]
        scores = {score: float(value) for score, value in self.target.summed(sums.sum(axis=0)).items()}
        return JudgedTarget(name, self.target, sums, scores, self.loss)
