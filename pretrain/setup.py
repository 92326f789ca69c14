"""What a run is made of, built from its recipe."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from data.loader import Loader
from data.resident import Resident, ResidentLoader
from pretrain import checkpoint
from pretrain.accelerator import as_launched, make_accelerator, on_main, wrap
from pretrain.build import Datasets, open_data, resolve
from pretrain.job import Job
from pretrain.materialise import materialise
from pretrain.optim import build_optimizer
from pretrain.precision import best
from pretrain.preemption import Preemption
from pretrain.recipe import Recipe
from pretrain.state import TrainingState


@dataclass
class Setup(Job):
    """The parts of a pre-training run on this process."""

    recipe: Recipe
    loader: Loader
    data: Datasets


def prepare(recipe: Recipe, folder: Path, resume: str = "auto") -> Setup:
    """Everything at its start: initial weights, position 0; writes nothing.

    Args:
        folder: of the run, where trackers will write.
        resume: where the run will go on, see `pretrain.loop.train`; decides what `train.precision=auto` was before.

    Raises:
        UserError: recipe, data, machine and number of processes do not fit together.
    """
    recipe = settle_precision(as_launched(recipe), folder, resume)
    accelerator = make_accelerator(recipe, folder)
    data = open_data(recipe)
    recipe = resolve(recipe, data)
    loader = make_loader(recipe, data, accelerator)
    objective, average = materialise(recipe, data, accelerator)
    optimizer = build_optimizer(objective, recipe.optimizer)
    if recipe.train.compile:
        objective.compile()
    model, optimizer = wrap(accelerator, objective, optimizer)
    state = TrainingState(objective, optimizer, average, accelerator.scaler)
    preemption = Preemption(folder / "STOP", recipe.watch.max_time, accelerator.is_main_process)
    samples, facts = len(data.train), data.facts
    steps = recipe.steps(samples)
    return Setup(recipe, accelerator, state, model, loader, steps, preemption, samples, facts, data)


def settle_precision(recipe: Recipe, folder: Path, resume: str = "auto") -> Recipe:
    """The recipe with `train.precision=auto` decided: as the run in `folder` was begun, else by this device.

    So a run goes on exactly, on whatever machine; where this one would have chosen otherwise, that is said.
    """
    if recipe.train.precision != "auto":
        return recipe
    here = PartialState()
    own = best(here.device)
    begun = on_main(here, lambda: checkpoint.saved_setting(folder / "checkpoints", resume, "train", "precision"))
    if begun not in (None, own) and here.is_main_process:
        print(
            f"headwater: this run began with train.precision={begun} and goes on with it; {here.device.type} here "
            f"would take {own}, which a new run (another --output) would get",
            file=sys.stderr,
        )
    return recipe.with_precision(begun or own)


def make_loader(recipe: Recipe, data: Datasets, accelerator: Accelerator) -> Loader:
    """This process's share of the recipe's global batches."""
    settings: dict[str, Any] = {
        "seed": recipe.seed,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "microbatch": recipe.train.microbatch,
        "lanes": recipe.data.lanes,
        "shuffle_samples": recipe.data.shuffle_samples,
    }
    canvas, workers, train = recipe.data.canvas, recipe.data.workers, recipe.train
    batch_size = train.batch_size if train.batch_warmup is None else train.batch_size_at
    if recipe.data.resident:
        resident = Resident(data.train, canvas, accelerator.device, workers)
        return ResidentLoader(resident, batch_size, **settings)
    pin_memory = accelerator.device.type == "cuda"
    return Loader(data.train, batch_size, workers=workers, canvas=canvas, pin_memory=pin_memory, **settings)
