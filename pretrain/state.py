"""What a run is between two steps, and how it becomes a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from data.errors import UserError
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint, load_optimizer, optimizer_tensors
from pretrain.objectives.protocol import Objective
from pretrain.recipe import Recipe


@dataclass
class TrainingState:
    """Everything that the next step depends on."""

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

    def snapshot(self, recipe: Recipe, fingerprint: str) -> Checkpoint:
        """The state as tensors and JSON."""
        tensors = {
            "model": self.objective.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer, self.objective),
        }
        if self.average is not None:
            tensors["ema"] = self.average.state_dict()
        state = {
            "step": self.step,
            "position": self.position,
            "skipped": self.skipped,
            "damaged": self.damaged,
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "identity": recipe.identity(),
            "fingerprint": fingerprint,
        }
        return Checkpoint(tensors, state)

    def restore(self, path: Path, recipe: Recipe, fingerprint: str) -> None:
        """Take over a verified checkpoint; raises `UserError` when it belongs to another recipe or dataset."""
        saved = checkpoint.read(path)
        changes = differences(saved.state["identity"], recipe.identity())
        if changes:
            raise UserError(
                f"{path} was made with another recipe ({'; '.join(changes)}); undo the change, or start anew with "
                "another --output"
            )
        if saved.state["fingerprint"] != fingerprint:
            raise UserError(f"{path} was made with other data than data.train holds now; restore the shards")
        try:
            self.objective.load_state_dict(saved.tensors["model"])
            if self.average is not None:
                self.average.load_state_dict(saved.tensors["ema"])
        except (RuntimeError, KeyError) as error:
            first = " ".join(str(error).split())[:200]
            raise UserError(f"{path} does not fit this version's model ({first}); start anew") from None
        load_optimizer(self.optimizer, self.objective, saved.tensors.get("optimizer", {}))
        if self.scaler is not None and saved.state["scaler"]:
            self.scaler.load_state_dict(saved.state["scaler"])
        self.step, self.position = saved.state["step"], saved.state["position"]
        self.skipped, self.damaged = saved.state["skipped"], saved.state.get("damaged", 0)

    def encoder(self) -> nn.Module:
        """The encoder to look at and to export: the average where one is kept."""
        return self.average if self.average is not None else self.objective.exported()


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
