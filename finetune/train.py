"""Training encoder and head together: full fine-tuning, and the same from scratch as its control."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Training:
    """One strategy on one set of labels: everything that stays the same while learning rates are tried."""

    start: Callable[[], Encoder]
    """Makes the encoder to be trained, with the weights training begins from."""
    samples: Samples
    classes: int
    seed: int
    settings: Settings
    accelerator: Accelerator
    head: Callable[[Encoder, Samples], LinearHead] | None = None
    """Makes the head that training begins from, out of the samples that this training sees; a small random one
    without."""
    before_step: Callable[[Encoder, float], None] | None = None
    """Called before each step with the encoder in training and the step's progress in (0, 1): to unfreeze gradually,
    for example. Parameters that are to be trained at some time need `requires_grad` at the start."""

    def fit(self, candidates: tuple[float, ...]) -> tuple[Encoder, LinearHead, dict[str, Any]]:
        """Trained encoder and head, and what was chosen.

        Without a set learning rate each of the `candidates` is tried on an inner split of these same
        labels (highest accuracy, then lowest loss); where no class has two, the middle one is taken.
        Deterministic for a seed; the process-wide random state stays as it was.
        """
        lr, trials = self.settings.lr, {}
        if lr is None:
            trials = self._try(candidates)
            lr = max(trials, key=lambda rate: trials[rate]) if trials else candidates[len(candidates) // 2]
        encoder, head, loss = self._train(self.samples, lr)
        if not math.isfinite(loss):
            raise UserError(f"fine-tuning diverged at a learning rate of {lr:g}; set a lower one (lr=…)")
        chosen: dict[str, Any] = {"lr": lr, "steps": steps_for(len(self.samples), self.settings)}
        if trials:
            chosen["inner_accuracy"] = {f"{rate:g}": accuracy for rate, (accuracy, _) in trials.items()}
        return encoder, head, chosen

    def _try(self, candidates: tuple[float, ...]) -> dict[float, tuple[float, float]]:
        """(accuracy, -loss) of each rate on a quarter of the labels; {} where they are too few to split."""
        samples = self.samples
        if len(samples) > TRIED:
            samples = samples.select(np.sort(_order(len(samples), self.seed, 0)[:TRIED]))
        count = min(4, int(np.bincount(samples.labels).max()))
        if count < 2:
            return {}
        number = folds(samples.labels, count, self.seed)
        inner, valid = (
            samples.select(np.flatnonzero(number != 0)),
            samples.select(np.flatnonzero(number == 0)),
        )
        if not len(valid):
            return {}
        labels, trials = torch.from_numpy(valid.labels), {}
        for lr in candidates:
            encoder, head, loss = self._train(inner, lr)
            with torch.no_grad():
                logits = head.cpu()(self._features(encoder, valid))
            if math.isfinite(loss):
                accuracy = float((logits.argmax(dim=1) == labels).double().mean())
                trials[lr] = (accuracy, -float(F.cross_entropy(logits, labels)))
        return trials

    def _train(self, samples: Samples, lr: float) -> tuple[Encoder, LinearHead, float]:
        """One run; also returns its mean loss, which is not finite where it diverged."""
        settings, accelerator, encoder = self.settings, self.accelerator, self.start()
        head = self._head(encoder, samples)
        groups = parameter_groups(encoder, head, settings.weight_decay, settings.layer_decay)
        optimizer = accelerator.prepare(torch.optim.AdamW(groups, lr=lr))
        parameters = [parameter for group in groups for parameter in group["params"]]
        encoder.train()
        steps, total = steps_for(len(samples), settings), torch.zeros((), device=accelerator.device)
        # Dropout and stochastic depth draw from the process-wide state, so it is put back afterwards.
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(self.seed)
            for step in range(steps):
                # The middle of the step: neither the first nor the last has a rate of zero.
                progress = (step + 0.5) / steps
                if self.before_step is not None:
                    self.before_step(encoder, progress)
                set_lr(optimizer, warmup_cosine(progress, lr, settings.warmup))
                loss = self._loss(encoder, head, samples, step)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(parameters, settings.clip)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
        return encoder.eval(), head.eval(), float(total) / steps

    def _loss(self, encoder: Encoder, head: LinearHead, samples: Samples, step: int) -> Tensor:
        batch, labels = _batch(samples, step, self.seed, self.settings.batch_size)
        with self.accelerator.autocast():
            features = encoder(batch.to(self.accelerator.device), self.settings.augmentation)
        logits = head(features.float())
        return F.cross_entropy(logits, labels.to(logits.device), label_smoothing=self.settings.label_smoothing)

    def _head(self, encoder: Encoder, samples: Samples) -> LinearHead:
        """The given head, or a small random one behind the features as they are now, standardised."""
        if self.head is not None:
            return self.head(encoder, samples).to(self.accelerator.device).train()
        head = LinearHead(encoder.features, self.classes, seed=self.seed)
        first = samples.select(np.sort(_order(len(samples), self.seed, 0)[:_STANDARD]))
        head.standardize(self._features(encoder, first))
        return head.to(self.accelerator.device)

    def _features(self, encoder: Encoder, samples: Samples) -> Tensor:
        return extract(encoder, samples, self.settings, self.accelerator)


def steps_for(samples: int, settings: Settings) -> int:
    """Optimiser steps for that many labelled samples."""
    return max(settings.min_steps, math.ceil(settings.epochs * samples / settings.batch_size))


def _batch(samples: Samples, step: int, seed: int, size: int) -> tuple[Any, Tensor]:
    """The `step`-th `size` samples of an endless sequence of epochs, each in its own keyed order."""
    place = np.arange(step * size, (step + 1) * size)
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
