"""Accelerate, set up the way the loop wants it."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from data.errors import UserError
from pretrain.recipe import Recipe


def make_accelerator(recipe: Recipe, folder: Path) -> Accelerator:
    """An `Accelerator` for the devices at hand; accumulation and batch sizes stay ours.

    Raises:
        UserError: fp16 without a GPU, or a tracker whose package is not installed.
    """
    if recipe.train.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision=fp16 needs a GPU; use bf16 or no")
    torch.use_deterministic_algorithms(recipe.train.deterministic)
    # Buffers are equal on all ranks by construction; sending them at every step would only cost time.
    handler = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    try:
        return Accelerator(
            mixed_precision=recipe.train.precision,
            log_with=recipe.watch.trackers or None,
            project_config=ProjectConfiguration(str(folder), logging_dir=str(folder / "trackers")),
            kwargs_handlers=[handler],
        )
    except ValueError as error:
        raise UserError(f"watch.trackers {recipe.watch.trackers}: {error}") from None


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Open the recipe's trackers, with its settings as flat names."""
    if recipe.watch.trackers:
        accelerator.init_trackers(recipe.name, config=_flat(recipe.model_dump(mode="json")))


def _flat(tree: dict, prefix: str = "") -> dict[str, int | float | str | bool]:
    flat: dict[str, int | float | str | bool] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
