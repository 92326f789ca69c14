"""An optimiser's state by the names of the parameters it belongs to, independent of groups, devices and shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from data.errors import UserError
from pretrain.sharding import like, local_rows
from pretrain.tensors import Stored

_HOW = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})
"""Entries of a group that say how a step is computed here, not what it computes."""


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The state as `layer.weight::exp_avg`, …; the live tensors."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    tensors = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{names[id(parameter)]}::{key}"] = torch.as_tensor(value)
    return tensors


def optimizer_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What each group holds beside its parameters, as far as JSON can; some optimisers count or adapt there."""
    return [
        {key: value for key, value in group.items() if key not in _HOW and isinstance(value, int | float | str | bool)}
        for group in optimizer.param_groups
    ]


def load_optimizer(optimizer: Optimizer, module: nn.Module, stored: Stored, groups: list[dict[str, Any]]) -> None:
    """The inverse of `optimizer_tensors` and `optimizer_groups`, cut as the parameters are here.

    Raises `UserError` when a name belongs to no parameter, or the groups are others.
    """
    parameters = dict(module.named_parameters())
    state: dict[Tensor, dict[str, Any]] = {}
    for key in sorted(stored.names):
        name, _, field = key.rpartition("::")
        if name not in parameters:
            raise UserError(f"the checkpoint's optimiser has state for {name!r}, which the model lacks")
        state.setdefault(parameters[name], {})[field] = _read(stored, key, parameters[name], optimizer)
    if len(groups) != len(optimizer.param_groups):
        raise UserError(f"the checkpoint's optimiser has {len(groups)} groups, not {len(optimizer.param_groups)}")
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)


def _read(stored: Stored, key: str, parameter: Tensor, optimizer: Optimizer) -> Tensor:
    shape = stored.shape(key)
    if not shape:
        # Step counters stay where the optimiser made them: on the host unless fused.
        count = stored.whole(key)
        return count.to(parameter.device) if optimizer.defaults.get("fused") else count
    if isinstance(parameter, DTensor) and shape == tuple(parameter.shape):
        return like(stored.rows(key, *local_rows(parameter)), parameter)
    return stored.whole(key).to(parameter.device)
