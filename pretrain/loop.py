"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.keyed import hash64
from pretrain import checkpoint
from pretrain.accelerator import heard, on_main, start_trackers
from pretrain.ema import update_average
from pretrain.evidence import keep_evidence
from pretrain.export import export, exported_step
from pretrain.gradient import Sums, global_gradient
from pretrain.optim import set_rates
from pretrain.preemption import verdict
from pretrain.progress import ProgressLine
from pretrain.recipe import Recipe
from pretrain.rollback import roll_back
from pretrain.run import RunFolder
from pretrain.saver import saving
from pretrain.session import Session
from pretrain.setup import Setup, prepare
from pretrain.watchdog import Watchdog
from pretrain.whole import whole


def train(recipe: Recipe, folder: Path, resume: str = "auto") -> Path:
    """Run a recipe from wherever `folder` stands to its end, and export the encoder.

    A run that has already ended, its export whole, is left as it is.

    Args:
        resume: `auto` (the newest good checkpoint in `folder`), `never`, or a checkpoint's path.

    Returns:
        The export's folder.

    Raises:
        UserError: recipe, data or checkpoint do not fit, and nothing was written; or a shard turned out to
            be damaged, or the disk full, on the way.
        RunFailed: too many steps in a row were bad, also after going back to checkpoints.
        Preempted: the run was asked to stop, and what it had done is saved.
    """
    setup = prepare(recipe, folder)
    recipe, accelerator, state = setup.recipe, setup.accelerator, setup.state
    run = RunFolder(folder, writes=setup.main)
    line = ProgressLine(setup.steps, recipe.train.batch_size, setup.main)
    start = on_main(accelerator, lambda: checkpoint.choose(run.checkpoints, resume, line.say))
    if start is not None:
        state.restore(start, recipe, setup.data.facts)
    if state.step >= setup.steps and on_main(accelerator, lambda: exported_step(run.export) == state.step):
        line.say(f"{recipe.name} has already ended at step {state.step:,}; nothing is left to do")
        accelerator.end_training()
        return run.export
    on_main(accelerator, lambda: run.begin(recipe, state.step))
    start_trackers(accelerator, recipe, state.extra)
    line.say(_opening(setup, start))
    with (
        setup.preemption.listening(),
        run.watched(state),
        heard(accelerator),
        saving(accelerator, run.checkpoints, recipe.watch, start) as saver,
        _watchdog(setup, run).watching() as watchdog,
    ):
        _run(Session(setup, run, line, saver, watchdog, saved=state.step if start else None))
        with watchdog.during("the export"):
            final = whole(setup)
            if setup.main:
                export(recipe, final.state, setup.data, run.export)
    accelerator.end_training()
    return run.export


def _run(session: Session) -> None:
    """Take all steps that are left, and log, evaluate and save when it is time."""
    setup, watch = session.setup, session.setup.recipe.watch
    state, batches = setup.state, session.batches()
    session.evaluate()  # where that was cut off
    while state.step < setup.steps:
        began = time.monotonic()
        sums = take_step(setup, batches)
        session.log(sums, time.monotonic() - began)
        if sums.trouble:
            keep_evidence(session, sums)
            if state.skipped > setup.recipe.train.skips:
                roll_back(session, sums.trouble)
                batches = session.batches()
                continue
        session.stop_if(verdict(sums.votes))
        session.evaluate()
        if session.due(watch.checkpoint_every):
            session.save()
    session.finish()


def take_step(setup: Setup, batches: Iterator[Any]) -> Sums:
    """One optimiser step on the next global batch; a bad one (see `pretrain.guard`) changes nothing but the count."""
    state, recipe = setup.state, setup.recipe
    progress = begin_step(setup)
    sums = global_gradient(setup, batches, progress)
    if not sums.trouble:
        state.optimizer.step()
        state.objective.after_step(progress, sums.statistics)
        if state.average is not None and recipe.train.ema is not None:
            update_average(state.average, state.objective.exported(), recipe.train.ema)
    elif state.scaler is not None:
        state.scaler.update()  # lowers the scale of fp16's loss where that was the cause
    state.optimizer.zero_grad(set_to_none=True)
    state.skipped = state.skipped + 1 if sums.trouble else 0
    if recipe.train.spike and not sums.trouble:
        state.extra["losses"] = [*state.extra.get("losses", []), sums.means["loss"]][-recipe.train.spike_window :]
    state.step, state.position = state.step + 1, setup.loader.position
    setup.preemption.started = True
    return sums


def begin_step(setup: Setup) -> float:
    """Set learning rates and torch's random numbers for the next step; returns its progress."""
    state, recipe = setup.state, setup.recipe
    progress = (state.step + 0.5) / setup.steps
    set_rates(state.optimizer, recipe.optimizer, progress, recipe.train.batch_size)
    # Whatever still draws from torch's global state (dropout in an encoder) depends on the step alone.
    torch.manual_seed(int(hash64(recipe.seed, state.step, setup.accelerator.process_index) >> 1))
    return progress


def _watchdog(setup: Setup, run: RunFolder) -> Watchdog:
    watch, state = setup.recipe.watch, setup.state

    def say(reason: str) -> None:
        run.status("hung", step=state.step, reason=reason)
        run.writes = False  # whatever the main thread still meets, this was the cause

    def folder() -> Path:
        return run.path / "stacks" / f"step-{state.step:09d}"

    return Watchdog(folder, watch.hang_factor, watch.hang_seconds, setup.accelerator.process_index, say)


def _opening(setup: Setup, start: Path | None) -> str:
    objective, accelerator = setup.state.objective, setup.accelerator
    weights = sum(p.numel() for p in objective.parameters())
    encoder = sum(p.numel() for p in objective.exported().parameters())
    where = f"resuming {start} at step {setup.state.step:,}" if start else "starting"
    return (
        f"{setup.recipe.name}: {where}; {setup.steps:,} steps of {setup.loader.batch_size} over "
        f"{len(setup.data.train):,} samples; {weights / 1e6:.2f}M parameters, {encoder / 1e6:.2f}M in the encoder; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
