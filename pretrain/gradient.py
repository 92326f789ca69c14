"""The gradient of one global batch, however it is split over microbatches and processes."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from data.keyed import hash64
from pretrain.guard import trouble
from pretrain.job import Job
from pretrain.norm import StatisticsGuard, untracked
from pretrain.objectives.protocol import JointObjective, Output
from pretrain.sharding import is_sharded, local, total_norm
from pretrain.warmup import cut


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
    votes: list[float]
    """Of all processes, to stop; see `pretrain.preemption`."""
    seen: list[Any]
    """Ids and keys of this process's microbatches, int64 (b,) each."""
    mine: float
    """This process's part of `loss`."""
    samples: int
    """Of the global batch."""
    trouble: str | None = None
    """Why the step must change nothing; see `pretrain.guard`."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the global batch for the objective's `after_step`."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)

    @property
    def means(self) -> dict[str, float]:
        """Loss and metrics, each divided by the number of targets."""
        count = max(self.count, 1.0)
        return {"loss": self.loss / count} | {name: value / count for name, value in self.metrics.items()}


def global_gradient(job: Job, batches: Iterator[Any], progress: float) -> Sums:
    """Put the gradient of the global batch's mean loss, clipped, into the parameters' `.grad`.

    Each microbatch adds the gradient of its *sum*, scaled by a constant; the number of targets of the
    whole global batch is known only at the end, and divides then. So 1 x 8, 2 x 4 and 8 x 1 agree. If the
    step must not count, BatchNorm's running statistics are those of before.
    """
    accelerator, objective = job.accelerator, job.state.objective
    guard = StatisticsGuard(objective)
    source = _Source(job, batches, progress)
    cached = objective.joint and source.accumulation > 1
    gathered = (_cached if cached else _accumulated)(job, source, progress)
    names = sorted(gathered.metrics)
    values = [gathered.loss_sum, gathered.target_count] + [gathered.metrics[name] for name in names]
    ballot = job.preemption.votes(accelerator.device)
    mine = torch.cat([torch.stack([value.detach().double() for value in values]), ballot])
    totals = accelerator.reduce(mine.clone(), reduction="sum")
    statistics = {name: accelerator.reduce(value, reduction="sum") for name, value in gathered.statistics.items()}
    norm = _scale_and_clip(job, source.size, totals[1])
    loss, count, *rest, norm_value, own = torch.cat([totals, norm[None], mine[:1]]).tolist()
    metrics, votes = dict(zip(names, rest, strict=False)), rest[len(names) :]
    sums = Sums(
        loss, count, norm_value, metrics, source.waited, votes, source.seen, own, source.size, statistics=statistics
    )
    train, window = job.recipe.train, job.state.extra.get("losses", [])
    sums.trouble = trouble(sums.means["loss"], norm_value, window, train.spike, train.spike_window)
    if sums.trouble:
        guard.restore()
    return sums


class _Source:
    """One global batch's microbatches, on the device, and the seconds they were waited for."""

    def __init__(self, job: Job, batches: Iterator[Any], progress: float) -> None:
        self.batches, self.device, self.waited = batches, job.accelerator.device, 0.0
        self.seen: list[Any] = []
        # Not the loader's own number, which becomes the next batch's once this one's last piece is read.
        self.size = job.recipe.train.batch_size_at(job.state.position)
        share = job.loader.share
        self.accumulation = self.size // share.world_size // share.microbatch(self.size)
        self.pieces = job.recipe.pieces(progress)

    def __next__(self) -> Any:
        asked = time.monotonic()
        batch = next(self.batches)
        self.seen.append((batch.ids, batch.keys))
        batch = batch.to(self.device, non_blocking=True)
        self.waited += time.monotonic() - asked
        return cut(batch, self.pieces) if self.pieces > 1 else batch


def _accumulated(job: Job, source: _Source, progress: float) -> Output:
    """One forward and backward pass a microbatch; processes' gradients are averaged with the last, or behind it."""
    accelerator = job.accelerator
    parts = []
    for number in range(source.accumulation):
        batch = next(source)
        # Sharded gradients are summed over the processes at once: holding them whole would undo the sharding.
        last = number + 1 == source.accumulation
        with nullcontext() if last or is_sharded(job.model) else accelerator.no_sync(job.model):
            output = job.model(batch, progress)
            accelerator.backward(output.loss_sum / source.size)
        parts.append(output)
    if not isinstance(job.model, DistributedDataParallel):
        _average_gradients(job)
    return Output(
        torch.stack([part.loss_sum.detach().double() for part in parts]).sum(),
        torch.stack([part.target_count.double() for part in parts]).sum(),
        _added([part.metrics for part in parts]),
        _added([part.statistics for part in parts]),
    )


def _added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def _cached(job: Job, source: _Source, progress: float) -> Output:
    """Gradient caching (GradCache: Gao et al. 2021, section 3): a loss over the whole share in several microbatches.

    All are embedded without a gradient, then compared at once, which gives the gradient of the embeddings; then
    each is embedded anew and takes its part of that gradient further. Memory is that of one microbatch; the price
    is a second forward pass.
    """
    accelerator, objective = job.accelerator, job.state.objective
    assert isinstance(objective, JointObjective)
    batches = [next(source) for _ in range(source.accumulation)]
    seed = torch.initial_seed()
    embedded, observed = [], []
    for number, batch in enumerate(batches):
        with torch.no_grad(), accelerator.autocast():
            views = objective.view(batch)
            _reseed(seed, number)
            with untracked(objective):
                embedded.append(objective.embed(views, progress))
            observed.append(objective.observe(views, progress))
    leaves = {name: torch.cat([part[name] for part in embedded]).requires_grad_() for name in embedded[0]}
    constants = {name: torch.cat([part[name] for part in observed]) for name in observed[0]}
    with accelerator.autocast():
        output = objective.compare(leaves | constants, progress)
    accelerator.backward(output.loss_sum / source.size)
    places = {name: [len(part[name]) for part in embedded] for name in leaves}
    gradients = {name: leaf.grad.split(places[name]) for name, leaf in leaves.items() if leaf.grad is not None}
    for number, batch in enumerate(batches):
        with accelerator.autocast():
            views = objective.view(batch)
            _reseed(seed, number)
            again = objective.embed(views, progress)
        torch.autograd.backward([again[name] for name in gradients], [gradients[name][number] for name in gradients])
    _average_gradients(job)
    return output


def _reseed(seed: int, number: int) -> None:
    """Both passes over a microbatch draw the same from torch's global state (stochastic depth, dropout)."""
    torch.manual_seed(int(hash64(seed & (2**63 - 1), number) >> np.uint64(1)))


def _average_gradients(job: Job) -> None:
    """What DistributedDataParallel and sharding do in their own backward passes: the mean over processes, in place."""
    if job.accelerator.num_processes == 1 or is_sharded(job.model):
        return
    gradients = [p.grad for p in job.state.objective.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    parts = flat.div_(job.accelerator.num_processes).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def _scale_and_clip(job: Job, batch_size: int, count: Tensor) -> Tensor:
    """Turn the accumulated gradient into that of the mean over `count` targets; returns its norm, a scalar."""
    accelerator, clip = job.accelerator, job.recipe.train.clip
    accelerator.unscale_gradients(job.state.optimizer)
    # The optimiser's list of parameters: walking the modules would take longer than scaling what they hold.
    held = [parameter for group in job.state.optimizer.param_groups for parameter in group["params"]]
    gradients = [p.grad for p in held if p.grad is not None]
    # Processes' gradients were averaged and divided by the batch size; the sum over the count is wanted.
    factor = accelerator.num_processes * batch_size / count.clamp(min=1.0)
    norm = total_norm(gradients).double() * factor
    if clip is not None:
        factor = factor * (clip / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor.to(gradients[0].dtype))
    return norm
