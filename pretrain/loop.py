"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from data.keyed import hash64
from pretrain import checkpoint
from pretrain.accelerator import heard, on_main, start_trackers
from pretrain.collapse import alarm
from pretrain.damage import count_damage
from pretrain.ema import update_average
from pretrain.evaluate import cadence, evaluate
from pretrain.export import export, exported_step
from pretrain.gradient import Sums, global_gradient
from pretrain.optim import set_rates
from pretrain.pace import Pace
from pretrain.progress import ProgressLine
from pretrain.recipe import Recipe
from pretrain.run import RunFolder
from pretrain.saver import Saver, saving
from pretrain.setup import Setup, prepare
from pretrain.whole import whole


class RunFailed(Exception):
    """The run cannot go on; the message says why and what to do."""


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
        RunFailed: too many steps in a row gave numbers that are not finite.
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
    with run.watched(state), heard(accelerator), saving(accelerator, run.checkpoints, recipe.watch) as saver:
        saver.last = start
        _run(setup, run, line, saver)
        final = whole(setup)
        if setup.main:
            export(recipe, final.state, setup.data, run.export)
    accelerator.end_training()
    return run.export


def _run(setup: Setup, run: RunFolder, line: ProgressLine, saver: Saver) -> None:
    """Take all steps that are left, and log, evaluate and save when it is time."""
    state, watch = setup.state, setup.recipe.watch
    setup.loader.position = state.position
    batches, pace, evaluate_every = iter(setup.loader), Pace(), cadence(setup)
    while state.step < setup.steps:
        began = time.monotonic()
        sums = take_step(setup, batches)
        pace.add(time.monotonic() - began, sums.waited)
        line.show(state.step, sums.means["loss"], pace)
        if _due(setup, watch.log_every) or _due(setup, watch.checkpoint_every):
            for sentence in count_damage(setup):
                line.say(f"step {state.step:,}: replaced a damaged sample: {sentence}")
        if _due(setup, watch.log_every) or not sums.finite:
            _record(setup, run, _measured(setup, sums, pace))
        if state.skipped > setup.recipe.train.skips:
            raise RunFailed(
                f"{state.skipped} steps in a row had a loss or gradient that is not finite; start again with "
                "another --output and a lower optimizer.lr, or with train.precision=bf16"
            )
        if evaluate_every and _due(setup, evaluate_every):
            values = evaluate(whole(setup))
            if values:
                _record(setup, run, values)
                line.say(f"step {state.step:,}: " + ", ".join(f"{name} {v:.4f}" for name, v in values.items()))
                _alarm(setup, run, line, sums.means | values)
        if _due(setup, watch.checkpoint_every):
            _save(setup, run, line, saver)
    line.end()
    on_main(setup.accelerator, lambda: _written(saver))


def take_step(setup: Setup, batches: Iterator[Any]) -> Sums:
    """One optimiser step on the next global batch; numbers that are not finite change nothing but the count."""
    state, recipe = setup.state, setup.recipe
    progress = (state.step + 0.5) / setup.steps
    set_rates(state.optimizer, recipe.optimizer, progress, recipe.train.batch_size)
    # Whatever still draws from torch's global state (dropout in an encoder) depends on the step alone.
    torch.manual_seed(int(hash64(recipe.seed, state.step, setup.accelerator.process_index) >> 1))
    sums = global_gradient(setup, batches, progress)
    if sums.finite:
        state.optimizer.step()
        state.objective.after_step(progress, sums.statistics)
        if state.average is not None and recipe.train.ema is not None:
            update_average(state.average, state.objective.exported(), recipe.train.ema)
    elif state.scaler is not None:
        state.scaler.update()  # lowers the scale of fp16's loss where that was the cause
    state.optimizer.zero_grad(set_to_none=True)
    state.skipped = 0 if sums.finite else state.skipped + 1
    state.step, state.position = state.step + 1, setup.loader.position
    return sums


def _due(setup: Setup, every: int) -> bool:
    return setup.state.step % every == 0 or setup.state.step == setup.steps


def _measured(setup: Setup, sums: Sums, pace: Pace) -> dict[str, float]:
    """One line of metrics.jsonl about the step just taken."""
    state = setup.state
    values = {
        "epoch": state.position / len(setup.data.train),
        **sums.means,
        "gradient_norm": sums.norm,
        "lr": max(group["lr"] for group in state.optimizer.param_groups),
        "samples_per_second": pace.rate * setup.loader.batch_size,
        "data_wait": pace.waiting,
    }
    if state.damaged:
        values["damaged"] = state.damaged
    return values if sums.finite else values | {"skipped": state.skipped}


def _record(setup: Setup, run: RunFolder, values: dict[str, float]) -> None:
    """To metrics.jsonl and to the trackers."""
    run.record({"step": setup.state.step, "samples": setup.state.position} | values)
    setup.accelerator.log(values, step=setup.state.step)


def _alarm(setup: Setup, run: RunFolder, line: ProgressLine, values: dict[str, float]) -> None:
    """Say so wherever one looks when features have collapsed, and take it back when they have recovered."""
    run.alarm = alarm(values)
    line.alarm = run.alarm is not None
    if run.alarm:
        run.record({"step": setup.state.step, "samples": setup.state.position, "alarm": run.alarm})
        line.say(f"step {setup.state.step:,}: {run.alarm}")


def _save(setup: Setup, run: RunFolder, line: ProgressLine, saver: Saver) -> None:
    """Begin to write a checkpoint; says what became of the one before."""
    problem = saver.finish()
    if problem:
        line.say(f"{problem}; the run goes on, and would resume from {saver.last or 'where it started'}")
    saver.save(setup.state.step, setup.state.snapshot(setup.recipe, setup.data.facts))
    facts = {"checkpoint": saver.last and saver.last.name, "problem": problem, "damaged": setup.state.damaged}
    run.status("running", step=setup.state.step, **{name: fact for name, fact in facts.items() if fact})


def _written(saver: Saver) -> None:
    """Wait for the last checkpoint; raises `UserError` when it could not be written."""
    problem = saver.finish()
    if problem:
        raise UserError(f"{problem}; make room, then the same command goes on from the checkpoint before")


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
