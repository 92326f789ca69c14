"""One of two processes that train with and without sharding and exchange checkpoints. Started twice by a test."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pretrain.build import build_objective
from pretrain.checkpoint import Retention, newest
from pretrain.ema import start_average
from pretrain.evaluate import evaluate
from pretrain.loop import take_step
from pretrain.optim import build_optimizer
from pretrain.recipe import Recipe
from pretrain.recipe_file import load_recipe
from pretrain.saver import Saver
from pretrain.setup import Setup, prepare
from pretrain.state import TrainingState
from pretrain.whole import whole

FIRST, MORE = 2, 3
"""Steps before and after each checkpoint."""


def sharded(recipe: Recipe, yes: bool) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"shard": yes})})


def steps(setup: Setup, count: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each."""
    setup.loader.position = setup.state.position
    batches = iter(setup.loader)
    sums = [take_step(setup, batches) for _ in range(count)]
    return [(each.loss, each.norm) for each in sums]


def save(setup: Setup, folder: Path) -> None:
    accelerator = setup.accelerator
    saver = Saver(folder, Retention(), accelerator.process_index, accelerator.num_processes, life="a")
    saver.save(setup.state.step, setup.state.snapshot(setup.recipe, "data"))
    assert saver.finish() is None, saver.problem
    accelerator.wait_for_everyone()


def resume(recipe: Recipe, folder: Path) -> Setup:
    setup = prepare(recipe, folder)
    path = newest(folder, print)
    assert path is not None
    setup.state.restore(path, setup.recipe, "data")
    return setup


def alone(setup: Setup, source: Path, target: Path) -> None:
    """What one process would do: read a checkpoint into plain modules, and save it again."""
    if setup.main:
        recipe = setup.recipe
        objective = build_objective(recipe)
        objective.read(setup.data.train)
        average = start_average(objective.exported()) if recipe.train.ema is not None else None
        state = TrainingState(objective, build_optimizer(objective, recipe.optimizer), average, None)
        path = newest(source, print)
        assert path is not None
        state.restore(path, recipe, "data")
        saver = Saver(target, Retention())
        saver.save(state.step, state.snapshot(recipe, "data"))
        assert saver.finish() is None
    setup.accelerator.wait_for_everyone()


def whole_tensors(setup: Setup) -> dict[str, Tensor]:
    """Every tensor of the state, gathered."""
    found = {}
    for kind, part in setup.state.snapshot(setup.recipe, "data").tensors.items():
        for name, tensor in part.items():
            found[f"{kind}/{name}"] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    return found


def observe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Losses and final tensors of runs that change their way of sharding at a checkpoint."""
    seen: dict[str, Any] = {}
    for kind, yes in (("plain", False), ("sharded", True)):
        setup = prepare(sharded(recipe, yes), folder)
        seen[f"{kind} first"] = steps(setup, FIRST)
        save(setup, folder / kind)
        seen[f"{kind} saved"] = whole_tensors(setup)
        alone(setup, folder / kind, folder / f"{kind} alone")
        seen[f"{kind} straight"] = steps(setup, MORE)
        seen[f"{kind} end"] = whole_tensors(setup)
        if yes:
            parameters = setup.state.objective.parameters()
            seen["local"] = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
            seen["global"] = sum(p.numel() for p in setup.state.objective.parameters())
        seen[f"{kind} evaluation"] = evaluate(whole(setup))
        seen[f"{kind} straight"] += steps(setup, 1)
    for source in ("plain", "sharded", "plain alone", "sharded alone"):
        for kind, yes in (("plain", False), ("sharded", True)):
            setup = resume(sharded(recipe, yes), folder / source)
            seen[f"{source} -> {kind} loaded"] = whole_tensors(setup)
            seen[f"{source} -> {kind}"] = steps(setup, MORE)
            seen[f"{source} -> {kind} end"] = whole_tensors(setup)
    return seen


if __name__ == "__main__":
    out, path = map(Path, sys.argv[1:])
    torch.save(observe(load_recipe(path), out.parent), out)
