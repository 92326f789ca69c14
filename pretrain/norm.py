"""BatchNorm over the global batch, and what keeps its running statistics honest.

Over processes, a training step's statistics are those of all processes' samples (as torch's `SyncBatchNorm`, which
needs a GPU; this one runs anywhere). Under accumulation there are two cases. A head of an objective that compares
samples sees all microbatches at once, so its BatchNorm is that of the global batch. An encoder's BatchNorm
normalises each microbatch (over all processes) by itself, and its running statistics take one step a microbatch:
accumulation with such an encoder trains with the microbatch's statistics, not the global batch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import reduce
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.gather import gather, world_size


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm (Ioffe and Szegedy 2015) whose batch is that of all processes; also timm's, with its activation."""

    drop: nn.Module | None = None
    act: nn.Module | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalised float (b, c) or (b, c, …), in the dtype that `input` has."""
        alone = not self.training or world_size() == 1
        x = super().forward(input) if alone else self._over_processes(input)
        for following in (self.drop, self.act):
            x = x if following is None else following(x)
        return x

    def _over_processes(self, input: Tensor) -> Tensor:
        mean, variance, count = _moments(input)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
                momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked or 1)
                unbiased = variance * (count / (count - 1).clamp(min=1.0))
                self.running_mean.lerp_(mean.to(self.running_mean), momentum)  # type: ignore[union-attr]
                self.running_var.lerp_(unbiased.to(self.running_var), momentum)  # type: ignore[union-attr]
        shape = (1, -1) + (1,) * (input.ndim - 2)
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (input * scale.view(shape) + shift.view(shape)).to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm needs (b, c, …), not {tuple(input.shape)}")


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and (biased) variance of each channel of everybody's `x` (b, c, …), float32 (c,), and their count."""
    flat = x.float()
    mean = reduce(flat, "b c ... -> c", "mean")
    variance = reduce((flat - mean.view(1, -1, *(1,) * (x.ndim - 2))).square(), "b c ... -> c", "mean")
    count = mean.new_full((1,), x.numel() / x.shape[1])
    means, variances, counts = gather(torch.cat([mean, variance, count])[None]).split([len(mean), len(mean), 1], 1)
    share = counts / counts.sum()
    mean = (share * means).sum(0)
    # Chan et al. 1979: no difference of large squares.
    return mean, (share * (variances + (means - mean).square())).sum(0), counts.sum()


def synchronise(module: nn.Module) -> nn.Module:
    """`module` with every BatchNorm replaced by a `GlobalBatchNorm` of the same tensors under the same names."""
    if isinstance(module, _BatchNorm) and not isinstance(module, GlobalBatchNorm):
        return _global(module)
    for name, child in module.named_children():
        found = synchronise(child)
        if found is not child:
            setattr(module, name, found)
    return module


def _global(norm: Any) -> GlobalBatchNorm:
    found = GlobalBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    found._parameters, found._buffers = norm._parameters, norm._buffers
    if isinstance(norm, BatchNormAct2d):
        found.drop, found.act = norm.drop, norm.act
    return found.train(norm.training)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm that keeps running statistics."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def untracked(module: nn.Module) -> Iterator[None]:
    """Leave running statistics as they are during a forward pass that will be done again."""
    norms = [norm for norm in batch_norms(module) if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


class StatisticsGuard:
    """Running statistics as they were, to be put back if the step turns out not to count."""

    def __init__(self, module: nn.Module) -> None:
        self._now = [buffer for norm in batch_norms(module) for buffer in norm.buffers(recurse=False)]
        self._before = [buffer.clone() for buffer in self._now]

    def restore(self) -> None:
        """Undo what forward passes have changed."""
        if self._now:
            torch._foreach_copy_(self._now, self._before)


def standardise(x: Tensor, mean: Tensor, variance: Tensor, eps: float = 1e-5) -> Tensor:
    """`x` (b, c) less `mean`, over the root of `variance + eps`, each (c,)."""
    return (x - mean) * torch.rsqrt(variance + eps)


def moments(x: Tensor, everybody: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance (c,) and number of the rows of `x` (b, c), over all processes where asked; float32."""
    if everybody and world_size() > 1:
        return _moments(x)
    variance, mean = torch.var_mean(x.float(), dim=0, correction=0)
    return mean, variance, mean.new_tensor(float(len(x)))
