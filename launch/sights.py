"""What a run's model sees, as pictures for its report."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from data.batch import ImageBatch
from data.errors import UserError
from data.loader import sequential
from pretrain.build import open_data
from pretrain.encoders.vision import VisionConfig
from pretrain.recipe_file import load_recipe
from pretrain.reload import load_objective

_PICTURES = 8
_LEAST_SIDE = 96
"""Small pictures are enlarged to about this many pixels a side."""


def sights(run: Path) -> list[tuple[str, str]]:
    """Rows of pictures, each (name, PNG in base64), from the run's export and its held-out (or training) data.

    Empty where there is no export, its data cannot be read here, or the objective shows nothing.
    """
    recipe = load_recipe(run / "recipe.yaml")
    if not isinstance(recipe.encoder, VisionConfig):
        return []
    try:
        objective, _ = load_objective(run / "export")
        data = open_data(recipe)
    except UserError:
        return []
    dataset = data.validation or data.train
    step = max(1, len(dataset) // _PICTURES)
    batch = next(sequential(dataset, _PICTURES, recipe.data.canvas, ids=dataset.all_ids()[::step][:_PICTURES]))
    assert isinstance(batch, ImageBatch)
    with torch.no_grad():
        return [(name, _png(pictures)) for name, pictures in objective.sights(batch).items()]


def _png(pictures: Tensor) -> str:
    """A row of pictures, float32 (b, 3, h, w) in [0, 1], as PNG in base64."""
    scale = max(1, round(_LEAST_SIDE / pictures.shape[-1]))
    enlarged = pictures.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    spaced = torch.nn.functional.pad(enlarged, (2, 2, 2, 2), value=1.0)
    row = rearrange((spaced.clamp(0, 1) * 255).round().to(torch.uint8), "b c h w -> h (b w) c")
    buffer = io.BytesIO()
    Image.fromarray(row.numpy()).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
