"""What a run is between two steps, and how it becomes a checkpoint and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from data.errors import UserError
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint
from pretrain.objectives.protocol import Objective
from pretrain.optimizer_state import load_optimizer, optimizer_groups, optimizer_tensors
from pretrain.recipe import RunRecipe
from pretrain.sharding import local, local_rows
from pretrain.tensors import Stored


@dataclass
class TrainingState:
    """Everything that the next step depends on.

    Random numbers need no state: those of samples come from their keys, and whatever still draws from torch's
    global generator is seeded at each step from (seed, step, process).
    """

    objective: Objective
    optimizer: Optimizer
    average: nn.Module | None
    scaler: Any
    """The loss scaler of fp16, else None."""
    step: int = 0
    """Steps taken."""
    position: int = 0
    """Samples consumed by all processes together."""
    skipped: int = 0
    """Steps skipped in a row for numbers that are not finite."""
    damaged: int = 0
    """Damaged samples that were replaced, over all processes."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else must survive, as JSON can hold it and by owner: statistics of losses, ranges of samples left
    out, the best metric, ids of trackers' runs. Saved and restored whole."""

    def snapshot(self, recipe: RunRecipe, data: Any) -> Checkpoint:
        """The live tensors by kind, and the rest as JSON; the saver takes the copy.

        `data` says which data they were trained on (`Datasets.facts`).
        """
        tensors = {"optimizer": optimizer_tensors(self.optimizer, self.objective)}
        for kind, module in self._modules().items():
            tensors[kind], tensors[f"{kind}_buffers"] = _module_tensors(module)
        state = {
            "step": self.step,
            "position": self.position,
            "skipped": self.skipped,
            "damaged": self.damaged,
            "extra": copy.deepcopy(self.extra),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "groups": optimizer_groups(self.optimizer),
            "identity": recipe.identity(),
            "data": data,
        }
        return Checkpoint(tensors, state)

    def restore(self, path: Path, recipe: RunRecipe, data: Any) -> None:
        """Take over a verified checkpoint, saved by any number of processes, sharded or not.

        Raises:
            UserError: it belongs to another recipe or dataset, or to another version of the model.
        """
        saved = checkpoint.read_state(path)
        check_same(path, saved, recipe, data)
        try:
            for kind, module in self._modules().items():
                buffers = checkpoint.read_tensors(path, f"{kind}_buffers")
                _load_module(module, checkpoint.read_tensors(path, kind), buffers)
            stored = checkpoint.read_tensors(path, "optimizer")
            load_optimizer(self.optimizer, self.objective, stored, saved["groups"])
        except (ValueError, RuntimeError, SafetensorError) as error:
            first = " ".join(str(error).split())[:200]
            raise UserError(f"{path} does not fit this version's model ({first}); start anew") from None
        if self.scaler is not None and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.position, self.skipped = saved["step"], saved["position"], saved["skipped"]
        self.damaged = saved["damaged"]
        self.extra = saved["extra"]

    def encoder(self) -> nn.Module:
        """The encoder to look at and to export: the average where one is kept."""
        return self.average if self.average is not None else self.objective.exported()

    def _modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"model": self.objective}
        return modules if self.average is None else modules | {"ema": self.average}


def check_same(path: Path, saved: Mapping[str, Any], recipe: RunRecipe, data: Any) -> None:
    """Raise `UserError`, with what differs, unless a checkpoint's run is the recipe's on the same data."""
    changes = differences(saved["identity"], recipe.identity())
    if changes:
        raise UserError(
            f"{path} was made with another recipe ({'; '.join(changes)}); undo the change, or start anew with "
            "another --output"
        )
    changes = differences({"data.train": saved["data"]}, {"data.train": data})
    if changes:
        raise UserError(
            f"{path} was made with other data than data.train holds now ({'; '.join(changes)}); restore the shards, "
            "or start anew with another --output"
        )


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Where two trees of settings differ, as `key: old -> new`.

    A field that only one version of the recipe's format knows (a key of the tree or of its sections) is
    passed over: it was not there to be set.
    """
    schema = prefix.count(".") < 2
    found = []
    for key in sorted(old.keys() & new.keys() if schema else old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found


def _module_tensors(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters and persistent buffers, and the buffers that `state_dict` leaves out, by name."""
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    listed = module.state_dict().keys()
    strange = sorted(listed - tensors.keys())
    if strange:
        raise TypeError(f"{type(module).__name__} keeps state that is neither parameter nor buffer: {strange}")
    return (
        {name: tensor for name, tensor in tensors.items() if name in listed},
        {name: tensor for name, tensor in tensors.items() if name not in listed},
    )


@torch.no_grad()
def _load_module(module: nn.Module, stored: Stored, buffers: Stored) -> None:
    """Copy into the module's own tensors; raises `ValueError` where names or shapes do not agree."""
    targets, others = _module_tensors(module)
    if targets.keys() != stored.names:
        missing, left = sorted(targets.keys() - stored.names), sorted(stored.names - targets.keys())
        raise ValueError(f"the checkpoint lacks {missing} and has {left} besides")
    for name, target in targets.items():
        if stored.shape(name) != tuple(target.shape):
            raise ValueError(f"{name} is {stored.shape(name)} in the checkpoint, {tuple(target.shape)} here")
        if isinstance(target, DTensor):
            local(target).copy_(stored.rows(name, *local_rows(target)))
        else:
            target.copy_(stored.whole(name))
    for name in buffers.names:
        tensor = buffers.whole(name)
        if name in others and others[name].shape == tensor.shape:
            others[name].copy_(tensor)
        else:  # tables that grow with use, or are made at the first
            owner, _, short = name.rpartition(".")
            tensor = tensor.to(next(module.parameters()).device)
            module.get_submodule(owner).register_buffer(short, tensor, persistent=False)
