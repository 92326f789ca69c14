"""A sharded run as a plain one, to evaluate and to export."""

from __future__ import annotations

import dataclasses

from pretrain.build import build_objective
from pretrain.ema import start_average
from pretrain.setup import Setup
from pretrain.sharding import copy_whole, is_sharded
from pretrain.state import TrainingState


def whole(setup: Setup) -> Setup:
    """The same run with plain modules on each device, to evaluate; all processes call this together.

    Sharded modules gather at each call, so processes could not evaluate shares of different length. A run that is not
    sharded is returned as it is; else this takes the memory of one model on each device.
    """
    if not is_sharded(setup.state.objective):
        return setup
    state = _empty(setup)
    for module in (state.objective, state.average):
        if module is not None:
            module.to(setup.accelerator.device)
    _gather(setup.state, state)
    return dataclasses.replace(setup, state=state)


def collected(setup: Setup) -> TrainingState | None:
    """The same state with plain modules in the main process's host memory, to export; None on the other processes.

    All processes call this together. Tensors are gathered one after the other, so no device holds the model. A run
    that is not sharded gives what it has.
    """
    if not is_sharded(setup.state.objective):
        return setup.state if setup.main else None
    state = _empty(setup) if setup.main else None
    _gather(setup.state, state)
    return state


def _empty(setup: Setup) -> TrainingState:
    """Plain modules like the run's, on the CPU, their weights still to come."""
    objective = build_objective(setup.recipe)
    objective.read(setup.data.train)
    average = None if setup.state.average is None else start_average(objective.exported())
    return dataclasses.replace(setup.state, objective=objective, average=average)


def _gather(state: TrainingState, plain: TrainingState | None) -> None:
    copy_whole(state.objective, None if plain is None else plain.objective)
    if state.average is not None:
        copy_whole(state.average, None if plain is None else plain.average)
