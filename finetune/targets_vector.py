"""Tasks that ask for a vector a sample: several labels at once, and measured quantities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.targets import Floats, Target, ratio

THRESHOLD = 0.5
"""A label is named from this probability on."""


class MultiLabel(Target):
    """Any number of labels a sample. Truth float32 (b, labels) of 0 and 1; decisions are their probabilities."""

    name = "multi-label"
    merit = "micro_f1"

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def loss(self, outputs: Tensor, truth: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy of each label; smoothing moves truth towards one half."""
        smooth = truth.float() * (1 - label_smoothing) + 0.5 * label_smoothing
        total = F.binary_cross_entropy_with_logits(outputs, smooth, reduction="sum")
        return total, torch.full((), truth.numel(), dtype=torch.float32, device=truth.device)

    def distribution(self, outputs: Tensor) -> Tensor:
        return outputs.float().sigmoid()

    def decision(self, said: Tensor) -> Tensor:
        return said

    def likelihoods(self, said: Tensor, truth: Tensor) -> Tensor:
        """Of each label's presence or absence, one sample after the other."""
        return said.where(truth > 0.5, 1 - said).flatten()

    def sums(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> Floats:
        """Labels named rightly, labels named, and labels present, one after the other: (n, 3 * labels)."""
        named = torch.stack(list(decided)).numpy() >= THRESHOLD
        present = torch.stack(list(truth)).numpy() > 0.5
        return np.concatenate([named & present, named, present], axis=1).astype(np.float64)

    def summed(self, sums: Floats) -> dict[str, Floats]:
        """`micro_f1`, over all labels together, and `macro_f1`, over labels present or named."""
        hits, named, present = np.split(sums, 3, axis=-1)
        both = named + present
        each, counted = ratio(2 * hits, both), (both > 0).sum(axis=-1).astype(np.float64)
        return {
            "micro_f1": ratio(2 * hits.sum(axis=-1), both.sum(axis=-1)),
            "macro_f1": ratio(each.sum(axis=-1), counted),
        }

    def score(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
        """`micro_f1`, `macro_f1`, and `map`, the mean over labels present of the average precision (the area
        under precision over recall, without interpolation)."""
        found = self.summed(self.sums(decided, truth).sum(axis=0))
        precision = _mean_average_precision(torch.stack(list(decided)), torch.stack(list(truth)))
        return {name: float(value) for name, value in found.items()} | {"map": precision}

    def constant(self, truth: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(truth)).float().mean(dim=0)

    def predictions(self, decided: Tensor) -> list[dict[str, Any]]:
        rows = decided.tolist()
        found = [{name: p for name, p in zip(self.classes, row, strict=True) if p >= THRESHOLD} for row in rows]
        return [{"labels": list(each), "probabilities": list(each.values())} for each in found]


class Regression(Target):
    """Measured quantities. Truth float32 (b, quantities) in their own units, as decisions are.

    The network's outputs are standardised by the training targets' mean and deviation, which are kept here.
    """

    name = "regression"
    merit = "r2"
    misfit = "squared_error"

    def __init__(self, classes: list[str], mean: Sequence[float], scale: Sequence[float]) -> None:
        """`mean` and `scale` (standard deviation, not 0) of each quantity."""
        self.classes, self.mean, self.scale = classes, list(mean), list(scale)

    def select(self, order: Sequence[int]) -> Regression:
        """These quantities in another order."""
        each = (self.classes, self.mean, self.scale)
        return Regression(*([values[i] for i in order] for values in each))  # type: ignore[arg-type]

    def standardized(self, truth: Tensor) -> Tensor:
        """Truth as the outputs are."""
        return (truth.float() - truth.new_tensor(self.mean)) / truth.new_tensor(self.scale)

    def loss(self, outputs: Tensor, truth: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Squared errors in standard deviations; there is nothing to smooth."""
        total = (outputs - self.standardized(truth)).square().sum()
        return total, torch.full((), truth.numel(), dtype=torch.float32, device=truth.device)

    def distribution(self, outputs: Tensor) -> Tensor:
        return outputs.float() * outputs.new_tensor(self.scale) + outputs.new_tensor(self.mean)

    def decision(self, said: Tensor) -> Tensor:
        return said

    def likelihoods(self, said: Tensor, truth: Tensor) -> Tensor:
        raise NotImplementedError("quantities have no likelihoods")

    def errors(self, said: Tensor, truth: Tensor) -> Tensor:
        """What is said beyond the truth, in standard deviations, one sample after the other: float64 (m,)."""
        return ((said.double() - truth.double()) / said.new_tensor(self.scale).double()).flatten()

    def mismatch(self, said: Tensor, truth: Tensor) -> Tensor:
        return self.errors(said, truth).square()

    def sums(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> Floats:
        """One, then for each quantity squared error, deviation from the training mean and its square, all in
        training deviations, and the absolute error in its unit: (n, 1 + 4 q)."""
        said, true = (torch.stack(list(each)).double().numpy() for each in (decided, truth))
        away = (true - np.array(self.mean)) / np.array(self.scale)
        errors = ((said - true) / np.array(self.scale)) ** 2
        return np.concatenate([np.ones((len(true), 1)), errors, away, away**2, np.abs(said - true)], axis=1)

    def summed(self, sums: Floats) -> dict[str, Floats]:
        """`r2`, 1 - squared error / variance of the judged samples (0 where nothing varies), and `mae`, the mean
        absolute error in the quantities' units; averaged over quantities."""
        count = sums[..., :1]
        errors, away, squares, absolute = np.split(sums[..., 1:], 4, axis=-1)
        spread = squares - ratio(away**2, np.broadcast_to(count, away.shape))
        known = spread > 1e-12 * np.maximum(squares, 1e-300)
        found = np.where(known, 1 - errors / np.where(known, spread, 1.0), 0.0)
        return {
            "r2": np.asarray(found.mean(axis=-1)),
            "mae": np.asarray(ratio(absolute, np.broadcast_to(count, absolute.shape)).mean(axis=-1)),
        }

    def score(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
        """`r2`, `mae` and `spearman`, each averaged over the quantities."""
        said, true = (torch.stack(list(each)).double().numpy() for each in (decided, truth))
        ranks = [_spearman(said[:, i], true[:, i]) for i in range(self.outputs)]
        found = self.summed(self.sums(decided, truth).sum(axis=0))
        return {name: float(value) for name, value in found.items()} | {"spearman": float(np.mean(ranks))}

    def constant(self, truth: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(truth)).float().mean(dim=0)

    def predictions(self, decided: Tensor) -> list[dict[str, Any]]:
        return [dict(zip(self.classes, row, strict=True)) for row in decided.tolist()]

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"mean": self.mean, "scale": self.scale}


def _mean_average_precision(probabilities: Tensor, truth: Tensor) -> float:
    from sklearn.metrics import average_precision_score

    present = truth.sum(dim=0) > 0
    if not present.any():
        return 0.0
    return float(average_precision_score(truth[:, present].numpy(), probabilities[:, present].numpy(), average="macro"))


def _spearman(one: Floats, other: Floats) -> float:
    """Correlation of ranks, ties sharing their mean rank; 0 where either is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(one), rankdata(other)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
