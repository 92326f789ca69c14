"""A sharded run as a plain one, to evaluate and to export."""

from __future__ import annotations

import dataclasses

from pretrain.build import build_objective
from pretrain.ema import start_average
from pretrain.setup import Setup
from pretrain.sharding import copy_whole, is_sharded


def whole(setup: Setup) -> Setup:
    """The same run with plain modules that need no other process; all processes call this together.

    Sharded modules gather at each call, so processes could not evaluate shares of different length, nor one alone
    export. A run that is not sharded is returned as it is; else this takes the memory of one model on each process.
    """
    state = setup.state
    if not is_sharded(state.objective):
        return setup
    objective = build_objective(setup.recipe)
    objective.read(setup.data.train)
    objective.to(setup.accelerator.device)
    average = None if state.average is None else start_average(objective.exported())
    copy_whole(state.objective, objective)
    if state.average is not None and average is not None:
        copy_whole(state.average, average)
    return dataclasses.replace(setup, state=dataclasses.replace(state, objective=objective, average=average))
