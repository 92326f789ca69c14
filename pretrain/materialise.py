"""A run's objective at its start: whole on each process, or cut over processes none of which holds all of it."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pretrain.accelerator import on_main, place
from pretrain.activations import recompute
from pretrain.build import Datasets, build_objective
from pretrain.continuation import take_over
from pretrain.ema import start_average
from pretrain.norm import synchronise
from pretrain.objectives.protocol import Objective
from pretrain.recipe import Recipe
from pretrain.sharding import fill


def materialise(recipe: Recipe, data: Datasets, accelerator: Accelerator) -> tuple[Objective, nn.Module | None]:
    """The objective with its initial weights and, where the recipe keeps one, its encoder's average, on the device.

    With `train.shard` and several processes, the main process alone draws (or reads) the weights, in its host's memory;
    all others build on the meta device. Then tensor after tensor is sent, and each process keeps its rows. So a
    device holds its share and one tensor at most, a host one model rather than one for each of its processes, and
    the weights are bit for bit those of an unsharded start.

    Raises:
        UserError: data or start do not fit the recipe, or the encoder cannot be sharded or recomputed.
    """
    several = accelerator.num_processes > 1
    if not (recipe.train.shard and several):
        objective = _initial(recipe, data)
        average = _dressed(objective, recipe, several)
        for module in (objective, average):
            if module is not None:
                place(module, recipe, accelerator)
        return objective, average
    drawn: list[Objective] = []
    on_main(accelerator, lambda: drawn.append(_initial(recipe, data)))
    with torch.device("meta"):
        objective = build_objective(recipe)
    average = _dressed(objective, recipe, several)
    _deal(objective, drawn[0] if drawn else None, recipe, accelerator)
    if average is not None:
        _deal(average, drawn[0].exported() if drawn else None, recipe, accelerator)
    return objective, average


def _initial(recipe: Recipe, data: Datasets) -> Objective:
    objective = build_objective(recipe)
    objective.read(data.train)
    if recipe.start is not None:
        take_over(objective, recipe.start, data.train)
    return objective


def _dressed(objective: Objective, recipe: Recipe, several: bool) -> nn.Module | None:
    """Modules as the recipe trains them, in place; returns a new average of the encoder, or None."""
    if several:
        synchronise(objective)
    average = start_average(objective.exported()) if recipe.train.ema is not None else None
    if recipe.train.recompute:
        recompute(objective)
    return average


def _deal(module: nn.Module, source: nn.Module | None, recipe: Recipe, accelerator: Accelerator) -> None:
    """Shard a module of meta tensors and fill it with those of `source`, which the main process has."""
    place(module, recipe, accelerator)
    module.to_empty(device=accelerator.device)
    given: dict[str, Tensor] = {}
    if source is not None:
        given = dict(source.named_parameters()) | dict(source.named_buffers())
    fill(module, given, accelerator.device)
