"""What a recipe would cost, found out before it runs: sizes by counting, speed by one small real step."""

from __future__ import annotations

import time
from typing import Any

import torch

from data.loader import Loader
from pretrain.build import build_objective, open_data, resolve
from pretrain.precision import best, caution
from pretrain.recipe import Recipe

_SAMPLES = 16
_BYTES_A_PARAMETER = 16
"""float32 weight, gradient and AdamW's two moments."""


def estimate(recipe: Recipe) -> dict[str, Any]:
    """Check recipe and data and estimate parameters, memory and time on one process here.

    Activations and speed are those of a forward and backward pass over a few real samples, without compile
    and mixed precision, so the time is an upper guide.

    Raises:
        UserError: as a run would, before it trains.
    """
    data = open_data(recipe)
    recipe = resolve(recipe, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = recipe.with_precision(best(device)).train.precision
    objective = build_objective(recipe).to(device)
    parameters = sum(p.numel() for p in objective.parameters())
    train = recipe.train
    # Can it be split?
    lanes, canvas = recipe.data.lanes, recipe.data.canvas
    Loader(data.train, train.batch_size, canvas=canvas, microbatch=train.microbatch, lanes=lanes)
    size = min(_SAMPLES, train.batch_size)
    loader = Loader(data.train, size, seed=recipe.seed, canvas=recipe.data.canvas)
    batches = iter(loader)
    seconds = []
    for _ in range(3):
        batch = next(batches).to(device)
        began = time.perf_counter()
        objective(batch, 0.5).loss_sum.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    steps = recipe.steps(len(data.train))
    return {
        "recipe": recipe.name,
        "samples": len(data.train),
        "held_out": len(data.validation) if data.validation else 0,
        "steps": steps,
        "epochs": round(steps * recipe.train.batch_size / len(data.train), 2),
        "parameters": parameters,
        "encoder_parameters": sum(p.numel() for p in objective.exported().parameters()),
        "weights_and_optimizer_bytes": parameters * _BYTES_A_PARAMETER,
        "device": device.type,
        "precision": precision,
        "caution": caution(precision, device),
        "samples_per_second": round(size / min(seconds), 1),
        "hours": round(steps * recipe.train.batch_size / (size / min(seconds)) / 3600, 2),
    }
