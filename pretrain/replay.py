"""`headwater replay RUN STEP`: take one step of a run again, exactly, and look into it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.errors import UserError
from pretrain import checkpoint
from pretrain.gradient import global_gradient
from pretrain.loop import begin_step, take_step
from pretrain.metrics import read_metrics
from pretrain.recipe_file import load_recipe
from pretrain.setup import Setup, prepare

_MOST_ALONE = 4096
"""Samples that are each tried alone."""


@dataclass
class Replayed:
    """What one step came to."""

    step: int
    state: str
    """Where it was rebuilt from: a checkpoint's path, or the start of the run."""
    retaken: int
    """Steps taken again to get there."""
    loss: float
    gradient_norm: float
    """Before clipping."""
    same: bool | None
    """Whether loss and gradient norm are, bit for bit, those that the run noted; None where it noted none."""
    layers: dict[str, float]
    """The gradient's norm by module."""
    first: str | None
    """The first module whose output is not finite."""
    samples: list[dict[str, Any]]
    """Those which, alone, give a loss or gradient that is not finite: `id`, `key`, `loss`, `gradient`, `name`."""


def replay(run: Path, step: int, settings: list[str] | None = None, start: Path | None = None) -> Replayed:
    """Rebuild the state before `step` and take it with open eyes; writes nothing.

    In one process, whatever the run had: then sums are added in another order, and `same` may be False.

    Args:
        step: as in metrics.jsonl, from 1.
        settings: `key=value` to change, such as `data.train=…` where the shards have moved.
        start: the state to start from, instead of the nearest one before.

    Raises:
        UserError: no such run or step, or no state to rebuild it from.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run folder (recipe.yaml is missing)")
    recipe = load_recipe(run / "recipe.yaml", [*(settings or []), "watch.trackers=[]", "data.workers=0"])
    setup = prepare(recipe, run)
    if not 0 < step <= setup.steps:
        raise UserError(f"{run} has no step {step}; its steps are 1 to {setup.steps:,}")
    start = _nearest(run, step) if start is None else start
    if start is not None:
        reason = checkpoint.problem(start)
        if reason:
            raise UserError(f"{start} cannot be used: {reason}")
        setup.state.restore(start, setup.recipe, setup.data.facts)
        if setup.state.step >= step:
            raise UserError(f"{start} lies behind step {step}; give one from before it")
    lines = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    if start is None or start.parent == run / "checkpoints":
        _pass_over(setup, lines)
    setup.loader.position, began = setup.state.position, setup.state.step
    batches = iter(setup.loader)
    while setup.state.step < step - 1:
        take_step(setup, batches)
    found = _look(setup, batches)
    return Replayed(
        step=step,
        state=str(start) if start else "the start of the run",
        retaken=step - 1 - began,
        same=_same([noted] if (noted := _report(run, step)) else lines, step, found["loss"], found["gradient_norm"]),
        **found,
    )


def _nearest(run: Path, step: int) -> Path | None:
    """The latest state from before `step`: kept as evidence, or a checkpoint; None for the run's start."""
    states = [path for folder in run.glob("bad/step-*") for path in checkpoint.complete(folder)]
    if _report(run, step) is None:  # a bad step may lie in a future that was given up: only its own states lead there
        states = checkpoint.complete(run / "checkpoints") + states
    fitting = [path for path in states if checkpoint.step_of(path) < step and checkpoint.problem(path) is None]
    return max(fitting, key=checkpoint.step_of, default=None)  # of two, the first: what the run came to


def _report(run: Path, step: int) -> dict[str, Any] | None:
    """What was noted of a bad step, if it was one."""
    path = run / "bad" / f"step-{step:09d}" / "report.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _pass_over(setup: Setup, lines: list[dict[str, Any]]) -> None:
    """Where the run was rolled back to this very checkpoint, it went on behind the samples that it left out."""
    for line in lines:
        if "rolled_back_from" in line and line["step"] == setup.state.step:
            setup.state.position = line["left_out"][1]


def _look(setup: Setup, batches: Iterator[Any]) -> dict[str, Any]:
    """Take the next step's gradient, unclipped, and find what is not finite in it."""
    microbatches = [next(batches) for _ in range(setup.loader.accumulation)]
    setup.recipe = setup.recipe.model_copy(update={"train": setup.recipe.train.model_copy(update={"clip": None})})
    objective, progress = setup.state.objective, begin_step(setup)
    with _first_not_finite(objective) as first:
        sums = global_gradient(setup, iter(microbatches), progress)
    layers: dict[str, float] = {}
    for name, parameter in objective.named_parameters():
        if parameter.grad is not None:
            owner = name.rpartition(".")[0] or name
            layers[owner] = math.hypot(layers.get(owner, 0.0), float(parameter.grad.double().norm()))
    setup.state.optimizer.zero_grad(set_to_none=True)
    return {
        "loss": sums.means["loss"],
        "gradient_norm": sums.norm,
        "layers": layers,
        "first": first[0] if first else None,
        "samples": [] if sums.finite else list(_alone(setup, microbatches, progress)),
    }


def _alone(setup: Setup, microbatches: list[Any], progress: float) -> Iterator[dict[str, Any]]:
    """The samples that alone are not finite; each is doubled, for BatchNorm and comparisons need two."""
    objective, data = setup.state.objective, setup.data.train
    device, left = setup.accelerator.device, _MOST_ALONE
    for batch in microbatches:
        for place in range(min(len(batch), left)):
            left -= 1
            alone = batch._map(lambda t, place=place: t[place : place + 1].repeat_interleave(2, dim=0)).to(device)
            begin_step(setup)
            objective.zero_grad(set_to_none=True)
            output = setup.model(alone, progress)
            setup.accelerator.backward(output.loss_sum)
            norms = [float(p.grad.double().norm()) for p in objective.parameters() if p.grad is not None]
            loss, gradient = output.loss_sum.item(), math.hypot(*norms)
            if not (math.isfinite(loss) and math.isfinite(gradient)):
                number = int(batch.ids[place])
                facts = {"id": number, "key": int(batch.keys[place]), "loss": loss, "gradient": gradient}
                yield facts | ({"name": data.key(number)} if data.kind == "images" else {})
    objective.zero_grad(set_to_none=True)


@contextmanager
def _first_not_finite(module: nn.Module) -> Iterator[list[str]]:
    """Collects the names of modules in the order in which they give something that is not finite."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not bool(output.isfinite().all()):
                found.append(name)

        return look

    handles = [child.register_forward_hook(hook(name)) for name, child in module.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _same(lines: list[dict[str, Any]], step: int, loss: float, norm: float) -> bool | None:
    said = [line for line in lines if line["step"] == step and "gradient_norm" in line]
    if not said:
        return None
    pairs = [(said[-1]["loss"], loss), (said[-1]["gradient_norm"], norm)]
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in pairs)


def describe(found: Replayed) -> str:
    """For people."""
    recorded = {True: "as recorded, bit for bit", False: "not what was recorded", None: "not recorded"}[found.same]
    lines = [
        f"step {found.step:,} from {found.state}" + (f", {found.retaken:,} steps taken again" if found.retaken else ""),
        f"loss {found.loss:.6g}, gradient norm {found.gradient_norm:.6g} ({recorded})",
    ]
    strange = {name: norm for name, norm in found.layers.items() if not math.isfinite(norm)}
    if strange:
        lines.append(f"gradients not finite in {len(strange)} of {len(found.layers)} layers")
    lines += [f"first output not finite: {found.first}"] if found.first else []
    lines += [f"  {norm:12.4g}  {name}" for name, norm in found.layers.items()]
    lines += [f"{len(found.samples)} samples are not finite alone:"] if found.samples else []
    lines += [
        f"  id {s['id']}  loss {s['loss']:.4g}  gradient {s['gradient']:.4g}  {s.get('name', '')}"
        for s in found.samples
    ]
    return "\n".join(lines)
