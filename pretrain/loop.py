"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from data.keyed import hash64
from data.loader import Loader
from pretrain import checkpoint
from pretrain.accelerator import make_accelerator, start_trackers
from pretrain.build import Datasets, build_objective, open_data, resolve
from pretrain.ema import start_average, update_average
from pretrain.evaluate import evaluate
from pretrain.export import export
from pretrain.optim import build_optimizer, set_lr
from pretrain.progress import ProgressLine
from pretrain.recipe import Recipe
from pretrain.run import RunFolder
from pretrain.schedules import warmup_cosine
from pretrain.state import TrainingState


class RunFailed(Exception):
    """The run cannot go on; the message says why and what to do."""


@dataclass
class Sums:
    """One global batch, added up over microbatches and processes."""

    loss: float
    count: float
    norm: float
    metrics: dict[str, float]
    waited: float
    """Seconds this process waited for data."""

    @property
    def finite(self) -> bool:
        return self.loss - self.loss == 0.0 and self.norm - self.norm == 0.0


def train(recipe: Recipe, folder: Path, resume: str = "auto") -> Path:
    """Run a recipe from wherever `folder` stands to its end, and export the encoder.

    Args:
        resume: `auto` (the newest good checkpoint in `folder`), `never`, or a checkpoint's path.

    Returns:
        The export's folder.

    Raises:
        UserError: recipe, data or checkpoint do not fit; nothing was written.
        RunFailed: too many steps in a row gave numbers that are not finite.
    """
    accelerator = make_accelerator(recipe, folder)
    data = open_data(recipe)
    recipe = resolve(recipe, data)
    state, model = _prepare(recipe, accelerator)
    run = RunFolder(folder, writes=accelerator.is_main_process)
    start = _where_to_start(run, resume, accelerator)
    if start is not None:
        state.restore(start, recipe, data.train.fingerprint)
    loader = _loader(recipe, data, state, accelerator)
    steps = recipe.steps(len(data.train))
    run.begin(recipe, state.step)
    start_trackers(accelerator, recipe)
    line = ProgressLine(steps, accelerator.is_main_process)
    line.say(_opening(recipe, data, state, steps, start, accelerator))
    try:
        _run(recipe, accelerator, data, state, model, loader, steps, run, line)
    except BaseException as error:
        run.status("failed", step=state.step, reason=f"{type(error).__name__}: {error}")
        raise
    if accelerator.is_main_process:
        export(recipe, state, data, folder / "export")
    run.status("finished", step=state.step)
    accelerator.end_training()
    return folder / "export"


def _run(
    recipe: Recipe,
    accelerator: Accelerator,
    data: Datasets,
    state: TrainingState,
    model: nn.Module,
    loader: Loader,
    steps: int,
    run: RunFolder,
    line: ProgressLine,
) -> None:
    watch, batches = recipe.watch, iter(loader)
    began, first, waited = time.monotonic(), state.step, 0.0
    while state.step < steps:
        progress = (state.step + 0.5) / steps
        lr = warmup_cosine(
            progress,
            recipe.optimizer.lr,
            recipe.optimizer.warmup,
            recipe.optimizer.lr * recipe.optimizer.final,
        )
        set_lr(state.optimizer, lr)
        _seed(recipe.seed, state.step, accelerator)
        sums = _gradient(accelerator, model, state, batches, loader, progress, recipe)
        if sums.finite:
            state.optimizer.step()
            state.objective.after_step(progress)
            if state.average is not None:
                assert recipe.train.ema is not None
                update_average(state.average, state.objective.exported(), recipe.train.ema)
        elif state.scaler is not None:
            state.optimizer.step()  # the scaler itself skips the update and lowers its scale
        state.optimizer.zero_grad(set_to_none=True)
        state.skipped = 0 if sums.finite else state.skipped + 1
        state.step, state.position = state.step + 1, loader.position
        waited += sums.waited
        spent = time.monotonic() - began
        rate = (state.step - first) / spent
        loss = sums.loss / max(sums.count, 1.0)
        line.show(state.step, loss, rate * recipe.train.batch_size, waited / spent, (steps - state.step) / rate)
        if _due(state.step, watch.log_every, steps) or not sums.finite:
            values = _metrics(sums, state, data, lr, rate * recipe.train.batch_size, waited / spent)
            run.record(values)
            accelerator.log(values, step=state.step)
        if state.skipped > recipe.train.skips:
            raise RunFailed(
                f"{state.skipped} steps in a row had a loss or gradient that is not finite; lower optimizer.lr or "
                "use train.precision=bf16, then go on from the last checkpoint"
            )
        if watch.evaluate_every and _due(state.step, watch.evaluate_every, steps):
            values = evaluate(recipe, state, data, accelerator)
            run.record({"step": state.step, "samples": state.position} | values)
            accelerator.log(values, step=state.step)
            line.say(f"step {state.step:,}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
        if _due(state.step, watch.checkpoint_every, steps):
            if accelerator.is_main_process:
                snapshot = state.snapshot(recipe, data.train.fingerprint)
                checkpoint.save(run.checkpoints, f"step-{state.step:09d}", snapshot, watch.checkpoint_keep)
                run.status("running", step=state.step)
            accelerator.wait_for_everyone()
    line.end()


def _gradient(
    accelerator: Accelerator,
    model: nn.Module,
    state: TrainingState,
    batches: Iterator[Any],
    loader: Loader,
    progress: float,
    recipe: Recipe,
) -> Sums:
    """The gradient of the global batch's mean loss, clipped, in the parameters' `.grad`.

    Each microbatch adds the gradient of its *sum*, scaled by a constant; the number of targets of the
    whole global batch is known only at the end, and divides then. So 1 x 8, 2 x 4 and 8 x 1 agree.
    """
    waited, totals, names = 0.0, torch.zeros(()), []
    for number in range(loader.accumulation):
        asked = time.monotonic()
        batch = next(batches).to(accelerator.device, non_blocking=True)
        waited += time.monotonic() - asked
        last = number + 1 == loader.accumulation
        with nullcontext() if last else accelerator.no_sync(model):
            output = model(batch, progress)
            accelerator.backward(output.loss_sum / loader.batch_size)
        names = sorted(output.metrics)
        values = [output.loss_sum, output.target_count] + [output.metrics[name] for name in names]
        totals = totals.to(accelerator.device) + torch.stack([v.detach().double() for v in values])
    totals = accelerator.reduce(totals, reduction="sum")
    accelerator.unscale_gradients(state.optimizer)
    gradients = [p.grad for p in state.objective.parameters() if p.grad is not None]
    # Processes' gradients were averaged and divided by the batch size; the sum over the count is wanted.
    factor = accelerator.num_processes * loader.batch_size / totals[1].clamp(min=1.0)
    norm = nn.utils.get_total_norm(gradients).double() * factor
    if recipe.train.clip is not None:
        factor = factor * (recipe.train.clip / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
    loss, count, norm_value, *metrics = torch.cat([totals[:2], norm[None], totals[2:]]).tolist()
    return Sums(loss, count, norm_value, dict(zip(names, metrics, strict=True)), waited)


def _prepare(recipe: Recipe, accelerator: Accelerator) -> tuple[TrainingState, nn.Module]:
    objective = build_objective(recipe).to(accelerator.device)
    average = start_average(objective.exported()) if recipe.train.ema is not None else None
    optimizer = build_optimizer(objective, recipe.optimizer)
    if recipe.train.compile:
        objective.compile()
    model = accelerator.prepare_model(objective)
    optimizer = accelerator.prepare_optimizer(optimizer)
    return TrainingState(objective, optimizer, average, accelerator.scaler), model


def _loader(recipe: Recipe, data: Datasets, state: TrainingState, accelerator: Accelerator) -> Loader:
    return Loader(
        data.train,
        recipe.train.batch_size,
        seed=recipe.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start=state.position,
        workers=recipe.data.workers,
        canvas=recipe.data.canvas,
        microbatch=recipe.train.microbatch,
        pin_memory=accelerator.device.type == "cuda",
    )


def _where_to_start(run: RunFolder, resume: str, accelerator: Accelerator) -> Path | None:
    """The checkpoint to go on from: chosen by the main process, for everybody."""
    choice: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            choice[0] = checkpoint.choose(run.checkpoints, resume)
        except Exception as error:
            choice[1] = error
    broadcast_object_list(choice)
    if choice[1] is not None:
        raise choice[1]
    return choice[0]


def _seed(seed: int, step: int, accelerator: Accelerator) -> None:
    """Whatever still draws from torch's global state (dropout in an encoder) depends on the step alone."""
    torch.manual_seed(int(hash64(seed, step, accelerator.process_index) >> 1))


def _due(step: int, every: int, steps: int) -> bool:
    return step % every == 0 or step == steps


def _metrics(
    sums: Sums, state: TrainingState, data: Datasets, lr: float, rate: float, waiting: float
) -> dict[str, float]:
    count = max(sums.count, 1.0)
    values = {
        "step": state.step,
        "samples": state.position,
        "epoch": state.position / len(data.train),
        "loss": sums.loss / count,
        "gradient_norm": sums.norm,
        "lr": lr,
        "samples_per_second": rate,
        "data_wait": waiting,
    }
    values |= {name: value / count for name, value in sums.metrics.items()}
    return values if sums.finite else values | {"skipped": state.skipped}


def _opening(
    recipe: Recipe,
    data: Datasets,
    state: TrainingState,
    steps: int,
    start: Path | None,
    accelerator: Accelerator,
) -> str:
    weights = sum(p.numel() for p in state.objective.parameters())
    encoder = sum(p.numel() for p in state.objective.exported().parameters())
    where = f"resuming {start} at step {state.step:,}" if start else "starting"
    return (
        f"{recipe.name}: {where}; {steps:,} steps of {recipe.train.batch_size} over {len(data.train):,} samples; "
        f"{weights / 1e6:.2f}M parameters, {encoder / 1e6:.2f}M in the encoder; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
