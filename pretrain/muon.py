"""Muon: momentum, orthogonalised, for the hidden matrices; AdamW for everything else, in one optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW

from pretrain.optimizer_settings import MuonConfig

_QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients that lift small singular values fastest (Jordan et al. 2024)."""


class Muon(AdamW):
    """Groups marked `orthogonal` take Muon's step, the others AdamW's.

    Unlike `torch.optim.Muon` it splits matrices that are several (`parts`, stacked by rows), flattens
    convolutions, and orthogonalises all matrices of one shape in one batch.
    """

    def __init__(self, groups: list[dict[str, Any]], config: MuonConfig, fused: bool) -> None:
        super().__init__(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        self.config = config

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                self._turn(group)
        return loss

    def _turn(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            update = _whole(self._look_ahead(parameter))
            stacked = rearrange(update.flatten(1), "(parts rows) columns -> parts rows columns", parts=group["parts"])
            by_shape.setdefault(tuple(stacked.shape[1:]), []).append((parameter, stacked))
        for shape, pairs in by_shape.items():
            size = update_size(shape, self.config.scaling)
            turned = orthogonalize(torch.cat([stacked for _, stacked in pairs]), self.config.iterations)
            for (parameter, _), matrices in zip(pairs, turned.split(group["parts"]), strict=True):
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                update = matrices.reshape(parameter.shape).to(parameter.dtype)
                parameter.add_(_like(update, parameter), alpha=-group["lr"] * size)

    def _look_ahead(self, parameter: Tensor) -> Tensor:
        """The running gradient with this step's added, and Nesterov's look ahead."""
        state, momentum = self.state[parameter], self.config.momentum
        assert parameter.grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        running = state["momentum_buffer"].lerp_(parameter.grad, 1.0 - momentum)
        return parameter.grad.lerp(running, momentum)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ in (n, rows, columns); singular values end between 0.7 and 1.2 or so.

    Newton-Schulz with a quintic (Jordan et al. 2024): bfloat16 on a GPU, float32 on a CPU.
    """
    a, b, c = _QUINTIC
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def update_size(shape: tuple[int, ...], scaling: str) -> float:
    """What an orthogonal update of a (rows, columns) matrix is multiplied with; see `MuonConfig.scaling`."""
    rows, columns = shape
    return 0.2 * math.sqrt(max(rows, columns)) if scaling == "rms" else math.sqrt(max(1.0, rows / columns))


def _whole(tensor: Tensor) -> Tensor:
    """Of a sharded matrix all of it: one cannot orthogonalise rows apart."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(whole: Tensor, parameter: Tensor) -> Tensor:
    """`whole`, sharded as `parameter` is; equal on all processes, so nothing is sent."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
