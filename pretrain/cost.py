"""What one step of a recipe costs, counted without computing it: operations, bytes moved, bytes held.

The real objective runs forward and backward, and the real optimiser steps, over weights and pictures that have
shapes and no numbers (torch's `FakeTensorMode`). What decides shapes by its values (documents, keys, masks) is
real and small. Every kernel is seen as it is called, so nothing of a new objective has to be described here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from data.batch import ImageBatch, TextBatch
from data.keyed import sample_keys
from pretrain.activations import recompute
from pretrain.build import build_objective
from pretrain.ema import start_average, update_average
from pretrain.kernels import counted_for
from pretrain.ledger import Ledger, Work
from pretrain.objectives.protocol import JointObjective, Objective
from pretrain.optim import build_optimizer
from pretrain.recipe import Recipe

_DOCUMENT = 512
"""Tokens of a document in the rows that are counted."""


@dataclass(frozen=True)
class StepCost:
    """One optimiser step on one device; sizes in bytes, of tensors that are not cut over devices."""

    work: Counter[Work]
    """Kernels, each with how often it runs."""
    microbatch: int
    accumulation: int
    parameters: int
    trainable: int
    encoder_parameters: int
    weights: int
    """Parameters and buffers, teachers included."""
    average: int
    """The moving average of the encoder, where one is kept (`train.ema`)."""
    gradients: int
    optimizer: int
    activations: int
    """The most that is held at once besides all these, views and the optimiser's scratch included."""
    canvases: int
    """One microbatch as it comes from the loader."""
    largest_block: int
    """Of the parts that a sharded model gathers one at a time."""

    @property
    def flops(self) -> int:
        """Of matrix products, convolutions and attention."""
        return sum(work.flops * times for work, times in self.work.items())

    @property
    def launches(self) -> int:
        """Kernels started."""
        return sum(self.work.values())


def count_step(recipe: Recipe, microbatch: int, accumulation: int, device: Literal["cpu", "cuda"]) -> StepCost:
    """Count a step of `accumulation` microbatches on one device of the given type.

    A resolved recipe is asked for (no vocabulary or classes left open). Losses that compare samples are counted
    over this device's samples. Rows of text are taken as documents of 512 tokens.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    objective = shapes_of(recipe, fake)
    average = start_average(objective.exported()) if recipe.train.ema is not None else None
    if recipe.train.recompute:
        recompute(objective)
    ledger = Ledger(fake)
    held = [p for p in objective.parameters() if p.requires_grad]
    with counted_for(device), ledger.gradients_of(held):
        batch = blank_batch(recipe, microbatch, fake)
        work = _passes(recipe, objective, batch, accumulation, ledger)
        optimizer = build_optimizer(objective, recipe.optimizer)
        optimizer.step()  # makes its state, once
        with ledger:
            optimizer.step()
            objective.after_step(0.5, ledger.statistics)
            if average is not None:
                update_average(average, objective.exported(), recipe.train.ema or 0.0)
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    optimizer_bytes = sum(map(_size, state))
    return StepCost(
        work=work + ledger.take(),
        microbatch=microbatch,
        accumulation=accumulation,
        parameters=sum(p.numel() for p in objective.parameters()),
        trainable=sum(p.numel() for p in held),
        encoder_parameters=sum(p.numel() for p in objective.exported().parameters()),
        weights=_module_size(objective),
        average=0 if average is None else _module_size(average),
        gradients=sum(_size(p) for p in held if p.grad is not None),
        optimizer=optimizer_bytes,
        activations=ledger.peak,
        canvases=sum(_size(value) for value in vars(batch).values()),
        largest_block=max([_module_size(m) for m in _blocks(objective)], default=_module_size(objective)),
    )


def _passes(
    recipe: Recipe, objective: Objective, batch: ImageBatch | TextBatch, accumulation: int, ledger: Ledger
) -> Counter[Work]:
    """Forward and backward over all microbatches, as `pretrain.gradient` takes them."""
    if accumulation == 1 or not objective.joint:
        with ledger, _precision(recipe):
            output = objective(batch, 0.5)
        with ledger:
            (output.loss_sum / len(batch)).backward()
        ledger.statistics = output.statistics
        return _times(ledger.take(), accumulation)
    assert isinstance(objective, JointObjective)
    assert isinstance(batch, ImageBatch)
    with ledger, _precision(recipe):
        with torch.no_grad():
            views = objective.view(batch)
            embedded, constants = objective.embed(views, 0.5), objective.observe(views, 0.5)
    work = _times(ledger.take(), accumulation)
    with ledger, _precision(recipe):
        leaves = {name: torch.cat([part] * accumulation).requires_grad_() for name, part in embedded.items()}
        whole = {name: torch.cat([part] * accumulation) for name, part in constants.items()}
        output = objective.compare(leaves | whole, 0.5)
    with ledger:
        (output.loss_sum / len(batch)).backward()
    ledger.statistics = output.statistics
    work += ledger.take()
    with ledger, _precision(recipe):
        again = objective.embed(objective.view(batch), 0.5)
    with ledger:
        named = [name for name, leaf in leaves.items() if leaf.grad is not None]
        torch.autograd.backward([again[name] for name in named], [torch.zeros_like(again[name]) for name in named])
    return work + _times(ledger.take(), accumulation)


def shapes_of(recipe: Recipe, fake: FakeTensorMode) -> Objective:
    """The objective with weights that have shapes and no numbers; whole numbers, which are tables, are zeros."""
    with torch.device("meta"):
        objective = build_objective(recipe)
    made: dict[int, Tensor] = {}
    for module in objective.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = made.setdefault(id(tensor), _blank(tensor, fake))  # type: ignore[assignment]
    return objective


def blank_batch(recipe: Recipe, size: int, fake: FakeTensorMode) -> ImageBatch | TextBatch:
    """A batch of the recipe's shapes; its keys and documents are real, its pictures are not."""
    ids = torch.arange(size)
    keys = torch.from_numpy(sample_keys(recipe.seed, 0, ids.numpy()))
    if recipe.encoder.kind == "vision":
        side = recipe.data.canvas
        with fake:
            images = torch.empty(size, 3, side, side, dtype=torch.uint8)
        return ImageBatch(images, torch.full((size, 2), side), torch.zeros(size, dtype=torch.int64), keys, ids)
    places = torch.arange(recipe.encoder.context + 1)
    tokens = places.expand(size, -1) % recipe.encoder.vocab_size
    return TextBatch(tokens.contiguous(), (places // _DOCUMENT).expand(size, -1).contiguous(), keys, ids)


@contextmanager
def _precision(recipe: Recipe) -> Iterator[None]:
    """Autocast as Accelerate sets it; fp16 is counted as bf16, of which it differs in no size."""
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision != "no"):
        yield


def _blank(tensor: Tensor, fake: FakeTensorMode) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    with fake:
        blank = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(blank, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else blank


def _blocks(objective: Objective) -> list[nn.Module]:
    lists = [module for module in objective.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return [child for parent in lists for child in parent if not isinstance(child, nn.ModuleList | nn.Sequential)]


def _times(work: Counter[Work], count: int) -> Counter[Work]:
    return Counter({each: number * count for each, number in work.items()})


def _module_size(module: nn.Module) -> int:
    return sum(map(_size, module.parameters())) + sum(map(_size, module.buffers()))


def _size(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
