"""A fine-tuning as a job of pretrain's loop: its recipe, its optimiser, its loader."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data.requests import Share
from finetune.layers import parameter_groups
from finetune.loader import SampleLoader
from finetune.objective import FineTuning
from finetune.samples import Samples
from finetune.settings import Settings
from pretrain.accelerator import wrap
from pretrain.ema import start_average
from pretrain.job import Job
from pretrain.norm import synchronise
from pretrain.optim import build_optimizer
from pretrain.optimizer_settings import AdamWConfig
from pretrain.preemption import Preemption
from pretrain.recipe import RunRecipe, TrainConfig, WatchConfig
from pretrain.state import TrainingState

_HOW = {"cpu", "precision", "microbatch", "inference_batch", "checkpoint_every", "lr", "trial_share"}
"""Settings that say how the same is computed, or are told elsewhere in a recipe."""
_LOOK = 64
"""Samples whose content is part of what identifies the data."""


class TuningRecipe(RunRecipe):
    """What defines one fit of encoder and head."""

    settings: dict[str, Any]
    """Of the strategy; see `finetune.settings`."""
    encoder_weights: str | None = None
    """Digest of those that training begins from; only a run with a folder has one."""


def steps_for(samples: int, settings: Settings) -> int:
    """Optimiser steps for that many labelled samples."""
    return max(settings.min_steps, math.ceil(settings.epochs * samples / settings.batch_size))


def make_job(
    objective: FineTuning,
    samples: Samples,
    lr: float,
    seed: int,
    settings: Settings,
    accelerator: Accelerator,
    folder: Path | None = None,
) -> Job:
    """A job at its start, on the accelerator's device; without a `folder` nothing about it can be resumed.

    Raises `UserError` where a global batch cannot be split evenly over the processes.
    """
    recipe = _recipe(objective, len(samples), lr, seed, settings, accelerator, digest=folder is not None)
    share = Share(accelerator.process_index, accelerator.num_processes, settings.microbatch, lanes=1)
    loader = SampleLoader(samples, settings.batch_size, seed, share, settings.augmentation)
    if accelerator.num_processes > 1:
        synchronise(objective)
    objective.to(accelerator.device).train()
    average = None if settings.ema is None else start_average(objective.exported())
    learner = objective.learner
    groups = parameter_groups(learner.encoder, learner.head, settings.weight_decay, settings.layer_decay)
    optimizer = build_optimizer(objective, recipe.optimizer, groups)
    changing = objective.before is not None or objective.target.dense
    model, optimizer = wrap(accelerator, objective, optimizer, changing)
    state = TrainingState(objective, optimizer, average, accelerator.scaler)
    stop = None if folder is None else folder / "STOP"
    preemption = Preemption(stop, main=accelerator.is_main_process)
    facts = {} if folder is None else {"samples": len(samples), "fingerprint": fingerprint(samples)}
    steps = steps_for(len(samples), settings)
    return Job(recipe, accelerator, state, model, loader, steps, preemption, len(samples), facts)


def _recipe(
    objective: FineTuning, count: int, lr: float, seed: int, settings: Settings, accelerator: Accelerator, digest: bool
) -> TuningRecipe:
    steps = steps_for(count, settings)
    return TuningRecipe(
        name="finetune",
        seed=seed,
        optimizer=AdamWConfig(lr=lr, warmup=settings.warmup, weight_decay=settings.weight_decay, betas=(0.9, 0.999)),
        train=TrainConfig(
            batch_size=settings.batch_size,
            steps=steps,
            microbatch=settings.microbatch,
            precision=accelerator.mixed_precision,
            clip=settings.clip,
            ema=settings.ema,
            rollbacks=0,
        ),
        watch=WatchConfig(checkpoint_every=settings.checkpoint_every or max(1, steps // 10)),
        settings=settings.model_dump(mode="json", exclude=_HOW),
        encoder_weights=weights_digest(objective.learner.encoder) if digest else None,
    )


def weights_digest(module: nn.Module) -> str:
    """A short hash of all parameters and buffers, by name."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(name.encode())
        found.update(_bytes(tensor))
    return found.hexdigest()[:16]


def fingerprint(samples: Samples) -> str:
    """A short hash of the samples' ids and labels, and of the content of some."""
    found = hashlib.sha256(json.dumps(samples.target.describe(), sort_keys=True).encode())
    found.update(samples.ids.tobytes() + samples.labels.tobytes())
    positions = np.unique(np.linspace(0, len(samples) - 1, min(_LOOK, len(samples))).astype(np.int64))
    batch = samples.batch(positions, samples.keys(0, 0, positions))
    for tensor in (*vars(batch).values(), samples.truth(positions)):
        found.update(_bytes(tensor))
    return found.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
