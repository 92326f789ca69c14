"""Optimisers by library, with the usual rules on what decays."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from torch.optim import AdamW, Optimizer

NO_DECAY_NAMES = ("pos_embed", "cls_token", "reg_token", "mask_token", "tok_embeddings")

Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(BaseModel):
    """How parameters move."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["adamw"] = "adamw"
    """Loshchilov and Hutter 2019."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate for the recipe's global batch; nothing scales it behind your back."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled; spares biases, norms, embeddings and tokens."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """Decay of the first and the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of training over which the rate rises from zero."""
    final: float = Field(default=0.0, ge=0)
    """Rate at the end, as a share of the peak."""


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices that decay, and vectors, embeddings and tokens that do not."""
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spare = parameter.ndim <= 1 or any(part in name for part in NO_DECAY_NAMES)
            (spared if spare else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group | {"lr_scale": 1.0} for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> Optimizer:
    """AdamW over `module`'s trainable parameters; the fused kernel on CUDA."""
    fused = any(parameter.is_cuda for parameter in module.parameters()) and torch.cuda.is_available()
    groups = parameter_groups(module, config.weight_decay)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """The rate of every group: `lr` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
