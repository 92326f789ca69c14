"""Frozen features, computed once and kept."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from data.errors import UserError
from finetune.encoder import Encoder
from finetune.samples import Samples
from finetune.settings import Settings


def accelerator_for(settings: Settings) -> Accelerator:
    """Device and precision. Raises `UserError` in a run of several processes, or for an unfit precision."""
    try:
        accelerator = Accelerator(cpu=settings.cpu, mixed_precision=settings.precision)
    except ValueError as error:
        raise UserError(f"precision {settings.precision!r} is not possible here: {error}") from None
    if accelerator.num_processes > 1:
        raise UserError("fine-tuning runs in one process; start it without `accelerate launch`")
    return accelerator


@torch.no_grad()
def extract(encoder: Encoder, samples: Samples, settings: Settings, accelerator: Accelerator) -> Tensor:
    """Pooled features of all samples in order: float32 (n, d), on the CPU; no augmentation."""
    encoder.to(accelerator.device).eval()
    features = torch.empty(len(samples), encoder.features)
    for positions, batch in samples.batches(settings.inference_batch):
        with accelerator.autocast():
            pooled = encoder(batch.to(accelerator.device))
        features[torch.from_numpy(positions)] = pooled.float().cpu()
    return features
