"""A teacher: a copy of the student's networks that follows them as a moving average and gets no gradient."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Teacher(nn.Module):
    """Copies, under their own names, of some of the student's networks; call them through attributes.

    In training their BatchNorm normalises with the batch's statistics, as the student's does (BYOL, appendix A;
    lightly's average forgets buffers), and everything else, stochastic depth above all, is as in evaluation.
    """

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, copy.deepcopy(network).requires_grad_(False))

    def train(self, mode: bool = True) -> Self:
        super().train(False)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.training = mode
        self.training = mode
        return self

    @torch.no_grad()
    def follow(self, momentum: float, **networks: nn.Module) -> None:
        """`teacher = momentum * teacher + (1 - momentum) * student`, for the parameters of the networks given.

        Buffers are left: BatchNorm's statistics are the teacher's own.
        """
        for name, network in networks.items():
            copied: Any = getattr(self, name)
            mine: list[Tensor] = list(copied.parameters())
            theirs: list[Tensor] = list(network.parameters())
            torch._foreach_lerp_(mine, theirs, 1.0 - momentum)
