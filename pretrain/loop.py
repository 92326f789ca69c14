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
from pretrain.gradient import Sums, global_gradient
from pretrain.job import Duties, Job
from pretrain.optim import set_rates
from pretrain.precision import caution
from pretrain.preemption import verdict
from pretrain.pretraining import EXPORT, Pretraining
from pretrain.progress import ProgressLine
from pretrain.recipe import Recipe
from pretrain.rollback import RunFailed, roll_back
from pretrain.run import RunFolder
from pretrain.saver import saving
from pretrain.session import Session
from pretrain.setup import prepare
from pretrain.watchdog import Watchdog


def train(recipe: Recipe, folder: Path, resume: str = "auto") -> Path:
    """Run a recipe from wherever `folder` stands to its end, and export the encoder.

    A run that has already ended, its export whole, is left as it is.

    Args:
        resume: `auto` (the newest good checkpoint in `folder`), `never`, or a checkpoint's path.

    Returns:
        The export's folder.

    Raises:
        UserError, RunFailed, Preempted: see `run`.
    """
    setup = prepare(recipe, folder, resume)
    run(setup, Pretraining(setup), folder, resume)
    setup.accelerator.end_training()
    return folder / EXPORT


def run(job: Job, duties: Duties, path: Path, resume: str = "auto") -> None:
    """Take a job from wherever the run's folder `path` stands to its end; `job.state` is then that of its last step.

    Raises:
        UserError: recipe, data or checkpoint do not fit, and nothing was written; or a shard turned out to
            be damaged, or the disk full, on the way.
        RunFailed: too many steps in a row were bad, also after going back to checkpoints.
        Preempted: the run was asked to stop, and what it had done is saved.
    """
    recipe, accelerator, state = job.recipe, job.accelerator, job.state
    folder = RunFolder(path, writes=job.main)
    line = ProgressLine(job.steps, recipe.train.batch_size, job.main)
    start = on_main(accelerator, lambda: checkpoint.choose(folder.checkpoints, resume, line.say))
    if start is not None:
        state.restore(start, recipe, job.facts)
    ended = state.step >= job.steps or duties.over()
    if ended and on_main(accelerator, lambda: duties.finished(path, state.step)):
        line.say(f"{recipe.name} has already ended at step {state.step:,}; nothing is left to do")
        return
    on_main(accelerator, lambda: folder.begin(recipe, state.step))
    start_trackers(accelerator, recipe, state.extra)
    line.say(_opening(job, start))
    if slow := caution(recipe.train.precision, accelerator.device):
        line.say(slow)
    with (
        job.preemption.listening(),
        folder.watched(state),
        heard(accelerator),
        saving(accelerator, folder.checkpoints, recipe.watch, start) as saver,
        _watchdog(job, folder).watching() as watchdog,
    ):
        _run(Session(job, duties, folder, line, saver, watchdog, saved=state.step if start else None))
        with watchdog.during("the export"):
            duties.finish(path)


def _run(session: Session) -> None:
    """Take all steps that are left, and log, evaluate and save when it is time."""
    job, watch = session.job, session.job.recipe.watch
    state, batches = job.state, session.batches()
    session.evaluate()  # where that was cut off
    while state.step < job.steps and not session.duties.over():
        began = time.monotonic()
        sums = take_step(job, batches)
        session.log(sums, time.monotonic() - began)
        if sums.trouble:
            keep_evidence(session, sums)
            if state.skipped > job.recipe.train.skips:
                roll_back(session, sums.trouble)
                batches = session.batches()
                continue
        session.stop_if(verdict(sums.votes))
        session.evaluate()
        if session.due(watch.checkpoint_every) or session.duties.over():
            session.save()
    session.finish()


def run_in_memory(job: Job, duties: Duties) -> None:
    """Take all steps of a job that leaves no trace: no folder, no checkpoints; evaluations where they are due.

    Raises `RunFailed` when too many steps in a row were bad.
    """
    state, batches = job.state, iter(job.loader)
    while state.step < job.steps and not duties.over():
        sums = take_step(job, batches)
        if state.skipped > job.recipe.train.skips:
            raise RunFailed(f"{state.skipped} steps in a row did not count ({sums.trouble})")
        if duties.cadence and (state.step % duties.cadence == 0 or state.step == job.steps):
            duties.evaluate()
            state.extra["evaluated"] = state.step


def take_step(job: Job, batches: Iterator[Any]) -> Sums:
    """One optimiser step on the next global batch; a bad one (see `pretrain.guard`) changes nothing but the count."""
    state, recipe = job.state, job.recipe
    progress = begin_step(job)
    sums = global_gradient(job, batches, progress)
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
    state.step, state.position = state.step + 1, job.loader.position
    job.preemption.started = True
    return sums


def begin_step(job: Job) -> float:
    """Set learning rates and torch's random numbers for the next step; returns its progress."""
    state, recipe = job.state, job.recipe
    progress = (state.step + 0.5) / job.steps
    state.objective.before_step(progress)
    set_rates(state.optimizer, recipe.optimizer, progress, recipe.train.batch_size)
    # Whatever still draws from torch's global state (dropout in an encoder) depends on the step alone.
    torch.manual_seed(int(hash64(recipe.seed, state.step, job.accelerator.process_index) >> 1))
    return progress


def _watchdog(job: Job, folder: RunFolder) -> Watchdog:
    watch, state = job.recipe.watch, job.state

    def say(reason: str) -> None:
        folder.status("hung", step=state.step, reason=reason)
        folder.writes = False  # whatever the main thread still meets, this was the cause

    def stacks() -> Path:
        return folder.path / "stacks" / f"step-{state.step:09d}"

    return Watchdog(stacks, watch.hang_factor, watch.hang_seconds, job.accelerator.process_index, say)


def _opening(job: Job, start: Path | None) -> str:
    objective, accelerator = job.state.objective, job.accelerator
    weights = sum(p.numel() for p in objective.parameters())
    encoder = sum(p.numel() for p in objective.exported().parameters())
    where = f"resuming {start} at step {job.state.step:,}" if start else "starting"
    return (
        f"{job.recipe.name}: {where}; {job.steps:,} steps of {job.loader.batch_size} over "
        f"{job.samples:,} samples; {weights / 1e6:.2f}M parameters, {encoder / 1e6:.2f}M in the encoder; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
