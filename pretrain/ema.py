"""An exponential moving average of an encoder's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pretrain.sharding import local


def start_average(module: nn.Module) -> nn.Module:
    """A copy of `module` that gets no gradient, to be moved by `update_average`."""
    return copy.deepcopy(module).requires_grad_(False).eval()


@torch.no_grad()
def update_average(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """`average = momentum * average + (1 - momentum) * module`; buffers that are no floats are copied."""
    pairs = zip(average.state_dict().values(), module.state_dict().values(), strict=True)
    floating = [(local(a), local(m)) for a, m in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floating], [m for _, m in floating], 1.0 - momentum)
    for a, m in zip(average.buffers(), module.buffers(), strict=True):
        if not a.is_floating_point():
            a.copy_(m)
