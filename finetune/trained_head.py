"""Strategy `frozen`: a linear head or an MLP, trained by AdamW on cached features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import UserError
from data.keyed import hash64
from finetune.heads import LinearHead, MLPHead
from finetune.job import steps_for
from finetune.loader import keyed_order
from finetune.settings import Settings
from finetune.splits import folds
from finetune.targets import Target
from pretrain.schedules import warmup_cosine

HIDDEN = (0, 512)
"""Widths of the hidden layer to choose among; 0 for a linear head."""
RATES = (1e-3, 3e-3, 1e-2)
"""Peak learning rates to choose among."""
TRIED = 5000
"""Samples on which they are compared at most."""


@dataclass(frozen=True)
class Rows:
    """What a head is fitted on, on the CPU, as `finetune.judge.flat_features` gives it."""

    features: Tensor
    """Float32 (m, d): a vector a sample, or, where the target is dense, one a word or patch."""
    truth: Tensor
    """(m, …), as the target takes it."""
    owners: NDArray[np.int64]
    """(m,) the sample, in [0, n), that each belongs to."""
    labels: NDArray[np.int64]
    """(n,) what an inner split of the samples is stratified by."""

    def of(self, samples: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """Features and truth of the samples where it is true, (n,)."""
        here = torch.from_numpy(samples[self.owners])
        return self.features[here], self.truth[here]


def fit_head(rows: Rows, target: Target, seed: int, settings: Settings) -> tuple[LinearHead | MLPHead, dict[str, Any]]:
    """A head, and what was chosen.

    Width and learning rate, unless set, are those with the best merit (for words and patches: the least loss) on a
    quarter of these same samples; where no class has two, a linear head at the middle rate.

    Raises:
        UserError: the loss became infinite.
    """
    widths = HIDDEN if settings.hidden is None else (settings.hidden,)
    rates = RATES if settings.lr is None else (settings.lr,)
    trials = _try(rows, target, seed, settings, list(product(widths, rates)))
    width, rate = max(trials, key=lambda pair: trials[pair]) if trials else (widths[0], rates[len(rates) // 2])
    head = _train(rows.features, rows.truth, target, seed, settings, width, rate)
    if not all(bool(parameter.isfinite().all()) for parameter in head.parameters()):
        raise UserError(f"the head diverged at a learning rate of {rate:g}; set a lower one (lr=…)")
    chosen: dict[str, Any] = {"hidden": width, "lr": rate, "steps": steps_for(len(rows.features), settings)}
    if trials:
        what = "loss" if target.dense else target.merit
        named = {
            f"hidden {width}, lr {rate:g}": -loss if target.dense else merit
            for (width, rate), (merit, loss) in trials.items()
        }
        chosen[f"inner_{what}"] = named
    return head, chosen


Choice = tuple[int, float]


def _try(
    rows: Rows, target: Target, seed: int, settings: Settings, choices: list[Choice]
) -> dict[Choice, tuple[float, float]]:
    """(merit, -loss) of each width and rate on held-out samples; {} where there is nothing to choose or to split."""
    shown = np.argsort(hash64(seed, 0x70_1E, np.arange(len(rows.labels))), kind="stable")[:TRIED]
    count = min(4, int(np.bincount(rows.labels[shown]).max()))
    if len(choices) == 1 or count < 2:
        return {}
    number = np.full(len(rows.labels), -2)
    number[shown] = folds(rows.labels[shown], count, seed)
    (features, truth), (asked, answers) = rows.of((number != 0) & (number != -2)), rows.of(number == 0)
    if not len(features) or not len(asked):
        return {}
    trials = {}
    for width, rate in choices:
        head = _train(features, truth, target, seed, settings, width, rate)
        with torch.no_grad():
            outputs = head(asked)
        total, targets = target.row_loss(outputs, answers)
        loss = float(total / targets.clamp(min=1))
        if math.isfinite(loss):
            trials[width, rate] = (0.0 if target.dense else _merit(target, outputs, answers), -loss)
    return trials


def _merit(target: Target, outputs: Tensor, truth: Tensor) -> float:
    return float(target.from_sums(target.sums(list(target.decide(outputs)), list(truth)).sum(axis=0)))


def _train(
    features: Tensor, truth: Tensor, target: Target, seed: int, settings: Settings, width: int, rate: float
) -> LinearHead | MLPHead:
    """One head; deterministic for a seed."""
    outputs, columns = target.outputs, features.shape[1]
    head = MLPHead(columns, width, outputs, seed) if width else LinearHead(columns, outputs, seed=seed)
    head.standardize(features)
    matrices = [parameter for parameter in head.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in head.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    steps = steps_for(len(features), settings)
    for step, positions in enumerate(_batches(len(features), steps, settings.batch_size, seed)):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine((step + 0.5) / steps, rate, settings.warmup)
        loss_sum, count = target.row_loss(head(features[positions]), truth[positions], settings.label_smoothing)
        (loss_sum / count.clamp(min=1)).backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
    return head.eval()


def _batches(samples: int, steps: int, size: int, seed: int) -> tuple[Tensor, ...]:
    """Positions of each step's samples: every epoch in an order of its own."""
    epochs = math.ceil(steps * size / samples)
    orders = [keyed_order(samples, seed, epoch) for epoch in range(epochs)]
    return torch.from_numpy(np.concatenate(orders)[: steps * size]).split(size)
