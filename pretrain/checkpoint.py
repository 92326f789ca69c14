"""Checkpoints that exist only when whole, and are believed only after checking.

A checkpoint is a folder: safetensors for tensors, JSON for the rest, nothing that runs. It is written
under a hidden name, every file forced to disk, a manifest of sizes and checksums last; then the folder
is renamed, and then `LATEST`. Reading takes the newest folder that matches its manifest.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from data.errors import UserError
from data.files import sha256, sync, write_atomically

MANIFEST = "manifest.json"


@dataclass
class Checkpoint:
    """A run's whole state between two steps."""

    tensors: dict[str, dict[str, Tensor]]
    """By file: `model` (the objective's state_dict), `optimizer`, and `ema` where one is kept."""
    state: dict[str, Any]
    """What JSON holds: step, position, recipe, dataset fingerprint, loss scaler."""


def save(folder: Path, name: str, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `checkpoint` as `folder/name`, point `LATEST` at it, then remove all but the newest `keep`.

    Names sort by age. Raises `UserError` when the disk is full or cannot be written; what was there stays.
    """
    try:
        return _save(folder, name, checkpoint, keep)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {folder / name} cannot be written ({error}); make room, then the same command goes on "
            "from the one before"
        ) from None


def _save(folder: Path, name: str, checkpoint: Checkpoint, keep: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    temporary, final = folder / f".{name}.partial", folder / name
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for kind, tensors in checkpoint.tensors.items():
        path = temporary / f"{kind}.safetensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        sync(path)
    write_atomically(temporary / "state.json", json.dumps(checkpoint.state, indent=1))
    files = sorted(temporary.iterdir())
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1))
    _remove(final)
    os.replace(temporary, final)
    sync(folder)
    write_atomically(folder / "LATEST", name + "\n")
    _prune(folder, name, keep)
    return final


def newest(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in `folder` that verifies, or None; damaged ones are reported and passed over."""
    for path in sorted(_complete(folder), reverse=True):
        reason = problem(path)
        if reason is None:
            return path
        report(f"checkpoint {path} is damaged ({reason}); looking for an older one")
    return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint that is known to be whole (`newest` or `problem` said so)."""
    tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return Checkpoint(tensors=tensors, state=json.loads((path / "state.json").read_text()))


def choose(folder: Path, resume: str, report: Callable[[str], None] = lambda _: None) -> Path | None:
    """Where a run goes on: `auto` is the newest good checkpoint in `folder`, `never` none, else a path.

    `report` is told about each damaged checkpoint that is passed over.

    Raises:
        UserError: the path does not verify; `never` in a folder that has checkpoints; all are damaged.
    """
    if resume not in ("auto", "never"):
        reason = problem(Path(resume))
        if reason:
            raise UserError(f"checkpoint {resume} cannot be used: {reason}")
        return Path(resume)
    if resume == "never" and _complete(folder):
        raise UserError(f"{folder} already holds checkpoints; choose another --output or go on with --resume auto")
    found = newest(folder, report)
    if found is None and _complete(folder):
        path = max(_complete(folder))
        raise UserError(f"no checkpoint in {folder} is whole ({path.name}: {problem(path)}); remove them to start anew")
    return found


def problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when every file matches the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, facts in manifest.items():
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
            if sha256(file) != facts["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None if "state.json" in manifest else "state.json is missing from the manifest"


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """An optimiser's state by parameter name: `layer.weight::exp_avg`, …"""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    tensors = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{names[id(parameter)]}::{key}"] = torch.as_tensor(value)
    return tensors


def load_optimizer(optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; raises `UserError` when a name belongs to no parameter."""
    parameters = dict(module.named_parameters())
    state: dict[Tensor, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("::")
        if name not in parameters:
            raise UserError(f"the checkpoint's optimiser has state for {name!r}, which the model lacks")
        parameter = parameters[name]
        # Step counters stay where the optimiser made them (on the host unless fused); moments go with the weight.
        device = parameter.device if tensor.ndim or optimizer.defaults.get("fused") else tensor.device
        state.setdefault(parameter, {})[field] = tensor.to(device)
    optimizer.state.clear()
    optimizer.state.update(state)


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def _prune(folder: Path, name: str, keep: int) -> None:
    """Remove what `name`, just written, makes superfluous."""
    found = sorted(_complete(folder))
    stale = [path for path in found if path.name <= name][:-keep]
    # A later one is left of a run that went on from an older checkpoint: damaged, or it would have been taken.
    stale += [path for path in found if path.name > name and problem(path)]
    for path in stale:
        _remove(path)
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Hide a checkpoint, then delete it: one that is half gone is never to be seen."""
    if path.exists():
        hidden = path.with_name(f".{path.name}.old.partial")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
