"""The gradient of one global batch, however it is split over microbatches and processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.setup import Setup


@dataclass
class Sums:
    """What one global batch added up to, over microbatches and processes."""

    loss: float
    count: float
    norm: float
    """Of the mean loss's gradient, before clipping."""
    metrics: dict[str, float]
    waited: float
    """Seconds this process waited for data."""

    @property
    def finite(self) -> bool:
        """Whether this step may change anything."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    @property
    def means(self) -> dict[str, float]:
        """Loss and metrics, each divided by the number of targets."""
        count = max(self.count, 1.0)
        return {"loss": self.loss / count} | {name: value / count for name, value in self.metrics.items()}


def global_gradient(setup: Setup, batches: Iterator[Any], progress: float) -> Sums:
    """Put the gradient of the global batch's mean loss, clipped, into the parameters' `.grad`.

    Each microbatch adds the gradient of its *sum*, scaled by a constant; the number of targets of the
    whole global batch is known only at the end, and divides then. So 1 x 8, 2 x 4 and 8 x 1 agree.
    """
    accelerator, loader = setup.accelerator, setup.loader
    waited, names = 0.0, []
    totals = torch.zeros((), device=accelerator.device)
    for number in range(loader.accumulation):
        asked = time.monotonic()
        batch = next(batches).to(accelerator.device, non_blocking=True)
        waited += time.monotonic() - asked
        last = number + 1 == loader.accumulation
        with nullcontext() if last else accelerator.no_sync(setup.model):
            output = setup.model(batch, progress)
            accelerator.backward(output.loss_sum / loader.batch_size)
        names = sorted(output.metrics)
        values = [output.loss_sum, output.target_count] + [output.metrics[name] for name in names]
        totals = totals + torch.stack([value.detach().double() for value in values])
    totals = accelerator.reduce(totals, reduction="sum")
    norm = _scale_and_clip(setup, totals[1])
    loss, count, *metrics, norm_value = torch.cat([totals, norm[None]]).tolist()
    return Sums(loss, count, norm_value, dict(zip(names, metrics, strict=True)), waited)


def _scale_and_clip(setup: Setup, count: Tensor) -> Tensor:
    """Turn the accumulated gradient into that of the mean over `count` targets; returns its norm, a scalar."""
    accelerator, clip = setup.accelerator, setup.recipe.train.clip
    accelerator.unscale_gradients(setup.state.optimizer)
    gradients = [p.grad for p in setup.state.objective.parameters() if p.grad is not None]
    # Processes' gradients were averaged and divided by the batch size; the sum over the count is wanted.
    factor = accelerator.num_processes * setup.loader.batch_size / count.clamp(min=1.0)
    norm = nn.utils.get_total_norm(gradients).double() * factor
    if clip is not None:
        factor = factor * (clip / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
    return norm
