"""Training encoder and head together: full fine-tuning, and the same from scratch as its control."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from data.errors import UserError
from data.keyed import hash64
from finetune.encoder import Encoder
from finetune.features import extract
from finetune.heads import LinearHead
from finetune.layers import parameter_groups
from finetune.samples import Ints, Samples
from finetune.settings import Settings
from finetune.splits import folds
from pretrain.optim import set_lr
from pretrain.schedules import warmup_cosine

LEARNING_RATES = {"full": (1e-4, 5e-4, 2.5e-3), "scratch": (3e-4, 1e-3, 3e-3)}
"""Peak rates to choose among: as many for the control. Untrained weights bear, and need, larger ones."""
TRIED = 2000
"""Labels on which learning rates are compared at most."""
_STANDARD = 2048
"""Samples over which the head's input is standardised."""


def fit(
    start: Callable[[], Encoder],
    samples: Samples,
    classes: int,
    seed: int,
    settings: Settings,
    accelerator: Accelerator,
    candidates: tuple[float, ...],
) -> tuple[Encoder, LinearHead, dict[str, Any]]:
    """Train what `start()` returns on the samples; returns encoder, head and what was chosen.

    Without a set learning rate each of the `candidates` is tried on an inner split of these same labels
    (highest accuracy, then lowest loss); where no class has two labels, the middle one is taken.
    Deterministic for a seed; the process-wide random state stays as it was.
    """
    lr, trials = settings.lr, {}
    if lr is None:
        trials = _try(start, samples, classes, seed, settings, accelerator, candidates)
        lr = max(trials, key=lambda rate: trials[rate]) if trials else candidates[len(candidates) // 2]
    encoder, head, loss = _train(start(), samples, classes, seed, settings, accelerator, lr)
    if not math.isfinite(loss):
        raise UserError(f"fine-tuning diverged at a learning rate of {lr:g}; set a lower one (lr=…)")
    chosen: dict[str, Any] = {"lr": lr, "steps": steps_for(len(samples), settings)}
    if trials:
        chosen["inner_accuracy"] = {f"{rate:g}": accuracy for rate, (accuracy, _) in trials.items()}
    return encoder, head, chosen


def steps_for(samples: int, settings: Settings) -> int:
    """Optimiser steps for that many labelled samples."""
    return max(settings.min_steps, math.ceil(settings.epochs * samples / settings.batch_size))


def _try(
    start: Callable[[], Encoder],
    samples: Samples,
    classes: int,
    seed: int,
    settings: Settings,
    accelerator: Accelerator,
    candidates: tuple[float, ...],
) -> dict[float, tuple[float, float]]:
    """(accuracy, -loss) of each candidate on a quarter of the labels; {} where they are too few to split."""
    if len(samples) > TRIED:
        samples = samples.select(np.sort(_order(len(samples), seed, 0)[:TRIED]))
    count = min(4, int(np.bincount(samples.labels).max()))
    number = folds(samples.labels, count, seed) if count > 1 else np.zeros(0)
    if not (number == 0).any():
        return {}
    inner, valid = samples.select(np.flatnonzero(number != 0)), samples.select(np.flatnonzero(number == 0))
    labels = torch.from_numpy(valid.labels)
    trials = {}
    for lr in candidates:
        encoder, head, loss = _train(start(), inner, classes, seed, settings, accelerator, lr)
        with torch.no_grad():
            logits = head.cpu()(extract(encoder, valid, settings, accelerator))
        if math.isfinite(loss):
            accuracy = float((logits.argmax(dim=1) == labels).double().mean())
            trials[lr] = (accuracy, -float(F.cross_entropy(logits, labels)))
    return trials


def _train(
    encoder: Encoder,
    samples: Samples,
    classes: int,
    seed: int,
    settings: Settings,
    accelerator: Accelerator,
    lr: float,
) -> tuple[Encoder, LinearHead, float]:
    """One run; also returns its mean loss, which is not finite where it diverged."""
    head = _head(encoder, samples, classes, seed, settings, accelerator)
    groups = parameter_groups(encoder, head, settings.weight_decay, settings.layer_decay)
    optimizer = accelerator.prepare(torch.optim.AdamW(groups, lr=lr))
    parameters = [parameter for group in groups for parameter in group["params"]]
    encoder.train()
    steps, total = steps_for(len(samples), settings), torch.zeros((), device=accelerator.device)
    # Dropout and stochastic depth draw from the process-wide state, so it is put back afterwards.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for step in range(steps):
            # The middle of the step: neither the first nor the last has a rate of zero.
            set_lr(optimizer, warmup_cosine((step + 0.5) / steps, lr, settings.warmup))
            batch, labels = _batch(samples, step, seed, settings)
            loss = _loss(encoder, head, batch.to(accelerator.device), labels, settings, accelerator)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
    return encoder.eval(), head.eval(), float(total) / steps


def _loss(
    encoder: Encoder,
    head: LinearHead,
    batch: Any,
    labels: Tensor,
    settings: Settings,
    accelerator: Accelerator,
) -> Tensor:
    with accelerator.autocast():
        features = encoder(batch, settings.augmentation)
    logits = head(features.float())
    return F.cross_entropy(logits, labels.to(logits.device), label_smoothing=settings.label_smoothing)


def _batch(samples: Samples, step: int, seed: int, settings: Settings) -> tuple[Any, Tensor]:
    """The next `batch_size` samples of an endless sequence of epochs, each in its own keyed order."""
    place = np.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
    epochs, ranks = place // len(samples), place % len(samples)
    positions = np.empty_like(place)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        positions[here] = _order(len(samples), seed, int(epoch))[ranks[here]]
    batch = samples.batch(positions, samples.keys(seed, epochs, positions))
    return batch, torch.from_numpy(samples.labels[positions])


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Ints:
    """A random order of `count` samples, int64 (count,); shared, not to be written to."""
    return np.argsort(hash64(seed, epoch, np.arange(count)), kind="stable").astype(np.int64)


def _head(
    encoder: Encoder, samples: Samples, classes: int, seed: int, settings: Settings, accelerator: Accelerator
) -> LinearHead:
    """A small random head behind the features as they are now, standardised."""
    head = LinearHead(encoder.features, classes, seed=seed)
    first = samples.select(np.sort(_order(len(samples), seed, 0)[:_STANDARD]))
    head.standardize(extract(encoder, first, settings, accelerator))
    return head.to(accelerator.device)
