"""Optimisers by library, with the usual rules on what decays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from pretrain.muon import Muon
from pretrain.optimizer_settings import (
    AdamWConfig,
    LambConfig,
    LarsConfig,
    MuonConfig,
    OptimizerConfig,
    SGDConfig,
)
from pretrain.parameter_groups import muon_groups, parameter_groups


class Lamb(timm.optim.Lamb):
    """timm's LAMB with the number of steps in each parameter's state, where checkpoints look for it."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every group."""
        for group in self.param_groups:
            taken = [state["step"] for p in group["params"] if "step" in (state := self.state.get(p, {}))]
            group["step"] = taken[0].cpu().clone() if taken else torch.tensor(0.0)
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    self.state[parameter]["step"] = group["step"].clone()
        return loss


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, groups: list[dict[str, Any]] | None = None
) -> Optimizer:
    """The optimiser that `config` names over `module`'s trainable parameters, fused where the library can.

    `groups` are as `parameter_groups` makes them, which is done here without.
    """
    groups = parameter_groups(module, config.weight_decay, config.layer_decay) if groups is None else groups
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    optimizer = _build(module, config, groups, fused)
    set_lr(optimizer, config.lr)
    return optimizer


def _build(module: nn.Module, config: OptimizerConfig, groups: list[dict[str, Any]], fused: bool) -> Optimizer:
    match config:
        case AdamWConfig():
            return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
        case MuonConfig():
            return Muon(muon_groups(module, groups, config.adamw_scale), config, fused)
        case SGDConfig():
            return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
        case LambConfig():
            # The loop has clipped already.
            return Lamb(_adapted(groups), lr=config.lr, betas=config.betas, eps=config.eps, max_grad_norm=None)
        case LarsConfig():
            for group in groups:
                group["lr_scale"] *= 1.0 if group["decays"] else config.vector_scale
            return timm.optim.Lars(_adapted(groups), lr=config.lr, momentum=config.momentum, trust_coeff=config.trust)
    raise TypeError(f"no optimiser for {type(config).__name__}")


def _adapted(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Let layer-wise adaptation follow what a parameter is, not whether its decay happens to be zero."""
    return [group | {"always_adapt": group["decays"]} for group in groups]


def set_rates(optimizer: Optimizer, config: OptimizerConfig, progress: float, batch_size: int) -> None:
    """Learning rate and weight decay of every group at `progress`, for a global batch of `batch_size` samples."""
    set_lr(optimizer, config.rate(progress, batch_size))
    decay = config.decay_at(progress)
    for group in optimizer.param_groups:
        group["weight_decay"] = decay if group["decays"] else 0.0


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """The rate of every group: `lr` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
