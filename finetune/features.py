"""Frozen features, computed once and kept."""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from data.errors import UserError
from finetune.encoder import Encoder
from finetune.samples import Samples
from finetune.settings import Settings
from pretrain.precision import best


def accelerator_for(settings: Settings) -> Accelerator:
    """Device, precision and processes, as Accelerate's launcher has set them; `UserError` for an unfit precision."""
    # Buffers are equal on all ranks by construction; sending them at every step would only cost time.
    handler = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    precision = settled(settings).precision
    try:
        return Accelerator(cpu=settings.cpu, mixed_precision=precision, kwargs_handlers=[handler])
    except ValueError as error:
        raise UserError(f"precision {precision!r} is not possible here: {error}") from None


def settled(settings: Settings) -> Settings:
    """The same with what `precision=auto` stands for on this machine's device."""
    if settings.precision != "auto":
        return settings
    return settings.model_copy(update={"precision": best(PartialState(cpu=settings.cpu).device)})


@torch.no_grad()
def extract(encoder: Encoder, samples: Samples, settings: Settings, accelerator: Accelerator) -> Tensor:
    """Pooled features of all samples in order: float32 (n, d), on the CPU; no augmentation.

    Several processes call this together; each computes a share of the batches, and all get everything, the same bits
    as one process would.
    """
    encoder.to(accelerator.device).eval()
    features = torch.zeros(len(samples), encoder.features)
    for number, (positions, batch) in enumerate(samples.batches(settings.inference_batch)):
        if number % accelerator.num_processes != accelerator.process_index:
            continue
        with accelerator.autocast():
            pooled = encoder(batch.to(accelerator.device))
        features[torch.from_numpy(positions)] = pooled.float().cpu()
    if accelerator.num_processes == 1:
        return features
    # Each row has one process that knows it; to all others it is zero.
    gathered: Tensor = accelerator.reduce(features.to(accelerator.device), reduction="sum").cpu()
    return gathered
