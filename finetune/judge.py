"""How good encoder and head are on labelled samples, whatever the kind of task; and features to fit a head on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.encoder import Encoder
from finetune.samples import Ints, Samples
from finetune.settings import Settings
from finetune.targets import IGNORED, Floats, Target

RESAMPLES = 2000
"""Draws of the bootstrap."""


@dataclass(frozen=True)
class Judgement:
    """What a model decided about samples, in their order."""

    target: Target
    decided: list[Tensor]
    """One `Target.decide` a sample, on the CPU."""
    truth: list[Tensor]
    """One truth a sample."""
    loss: float
    """Mean loss over targets."""

    @property
    def merit(self) -> float:
        """The score that models are compared by; higher is better."""
        return float(self.target.from_sums(self.target.sums(self.decided, self.truth).sum(axis=0)))

    def score(self) -> dict[str, float]:
        """Every score of the target."""
        return self.target.score(self.decided, self.truth)


@torch.no_grad()
def judge(
    encoder: Encoder, head: nn.Module, samples: Samples, settings: Settings, accelerator: Accelerator
) -> Judgement:
    """Decide every sample, without augmentation; encoder and head end in `eval` on the accelerator's device."""
    target = samples.target
    head.to(accelerator.device).eval()
    decided: list[Tensor] = [torch.empty(0)] * len(samples)
    truths: list[Tensor] = [torch.empty(0)] * len(samples)
    total, count = 0.0, 0.0
    for positions, features in stream(encoder, samples, settings, accelerator):
        outputs, truth = head(features), samples.truth(positions)
        loss, here = target.loss(outputs, truth.to(outputs.device))
        total, count = total + float(loss), count + float(here)
        for place, said, true in zip(positions, target.decide(outputs).cpu(), truth, strict=True):
            decided[place], truths[place] = said, true
    return Judgement(target, decided, truths, total / count if count else float("nan"))


@torch.no_grad()
def stream(
    encoder: Encoder, samples: Samples, settings: Settings, accelerator: Accelerator
) -> Iterator[tuple[Ints, Tensor]]:
    """(positions, float32 features on the device) of all samples in batches: pooled, or dense where the target is."""
    encoder.to(accelerator.device).eval()
    for positions, batch in samples.batches(settings.inference_batch):
        with accelerator.autocast():
            features = encoder(batch.to(accelerator.device), dense=samples.target.dense)
        yield positions, features.float()


def flat_features(
    encoder: Encoder, samples: Samples, settings: Settings, accelerator: Accelerator
) -> tuple[Tensor, Tensor, Tensor]:
    """Every judged vector in one matrix, to standardise by or to fit a head on; on the CPU.

    Returns:
        features float32 (m, d); truth (m, …); and int64 (m,) the sample each belongs to. For pooled tasks
        m = n, in order; for tokens m is the number of words, for segmentation that of patches, whose
        truth is their commonest known class.
    """
    features, truths, owners = [], [], []
    for positions, found in stream(encoder, samples, settings, accelerator):
        truth = samples.truth(positions)
        where = torch.from_numpy(positions)
        if samples.target.dense:
            if truth.ndim == 3:
                truth = commonest(truth, found.shape[1], found.shape[2], samples.target.outputs)
            known = truth != IGNORED
            where = where.view(-1, *[1] * (truth.ndim - 1)).expand_as(truth)[known]
            found, truth = found.cpu()[known], truth[known]
        features.append(found.cpu())
        truths.append(truth)
        owners.append(where)
    owner = torch.cat(owners)
    order = owner.argsort(stable=True)
    return torch.cat(features)[order], torch.cat(truths)[order], owner[order]


def commonest(masks: Tensor, rows: int, columns: int, classes: int) -> Tensor:
    """The commonest known class of each cell of a grid over masks (b, h, w): int64 (b, rows, columns).

    `IGNORED` where nothing of a cell is known; the first of equally common classes wins.
    """
    b, h, w = masks.shape
    down = torch.arange(h) * rows // h
    across = torch.arange(w) * columns // w
    cell = (torch.arange(b)[:, None, None] * rows + down[None, :, None]) * columns + across
    known = masks != IGNORED
    counts = torch.zeros(b * rows * columns * classes, dtype=torch.int64)
    counts.scatter_add_(0, (cell * classes + masks)[known], torch.ones_like(masks[known]))
    most = counts.view(-1, classes).max(dim=1)
    return most.indices.where(most.values > 0, IGNORED).view(b, rows, columns)


Interval = tuple[float, float]


def score_intervals(judgements: list[Judgement], resamples: int = RESAMPLES) -> dict[str, Interval]:
    """95 % intervals of the mean scores of several seeds' models on the same samples, by bootstrap.

    Of those scores that summed counts tell (`Target.summed`), by name. Samples, and seeds where there are
    several, are drawn with replacement; the same samples for every seed.
    """
    target = judgements[0].target
    sums = np.stack([target.sums(each.decided, each.truth) for each in judgements])
    return sums_intervals(target, sums, resamples)


def sums_intervals(target: Target, sums: Floats, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """The same from the samples' `Target.sums` (seeds, n, k)."""
    seeds, items = sums.shape[:2]
    # Raw bits of a fixed Philox stream: the same numbers under every version of NumPy.
    stream_of_bits = np.random.Philox(key=0)
    means: dict[str, list[float]] = {}
    for _ in range(resamples):
        bits = stream_of_bits.random_raw(seeds + items)
        times = np.bincount((bits[seeds:] % np.uint64(items)).astype(np.int64), minlength=items)
        drawn = (bits[:seeds] % np.uint64(seeds)).astype(np.int64)
        for name, values in target.summed(np.einsum("n,snk->sk", times.astype(np.float64), sums)).items():
            means.setdefault(name, []).append(float(values[drawn].mean()))
    bounds = {name: np.quantile(values, [0.025, 0.975]) for name, values in means.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}
