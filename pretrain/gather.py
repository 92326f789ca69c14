"""Collectives that a gradient flows through, so that a loss over the global batch is that of one process.

Each process sums the losses of its own samples; what it compares them with comes from everybody. The gradient of
the sum over all processes then asks each collective's backward pass to add up what every process felt. Without a
process group all of them return what they were given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Processes of this run."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """Everybody's `x` (b, …), in the order of the processes: (processes * b, …); equal shapes everywhere."""
    return _Gather.apply(x) if world_size() > 1 else x


def all_sum(x: Tensor) -> Tensor:
    """The sum of everybody's `x`, any shape, on every process."""
    return _Sum.apply(x) if world_size() > 1 else x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        whole = x.new_empty(world_size() * len(x), *x.shape[1:])
        distributed.all_gather_into_tensor(whole, x.contiguous())
        return whole

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        # A reduce-scatter would do; gloo offers none for every type, and these tensors are small.
        whole = gradients[0].contiguous().clone()
        distributed.all_reduce(whole)
        return whole.chunk(world_size())[rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        total = x.contiguous().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total
