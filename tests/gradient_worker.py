"""One process's view of a global batch: which samples, which views, which gradient. Started twice by a test."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import ImageBatch, TextBatch
from pretrain.gradient import global_gradient
from pretrain.objectives.hybrid import Hybrid
from pretrain.objectives.masked_language import MaskedLanguage
from pretrain.objectives.next_token import NextToken
from pretrain.objectives.protocol import Objective
from pretrain.objectives.replaced_token import ReplacedToken
from pretrain.recipe import Recipe
from pretrain.recipe_file import load_recipe
from pretrain.setup import prepare

PROGRESS = 0.3


def observe(recipe: Recipe, folder: Path, batches: int = 2) -> dict[str, Any]:
    """The first global batches as this process meets them, and the last one's gradient."""
    setup = prepare(recipe, folder)
    objective = setup.state.objective
    ids: list[int] = []
    views: list[str] = []
    targets = 0.0

    def watched(loader: Iterator[Any]) -> Iterator[Any]:
        nonlocal targets
        for batch in loader:
            ids.extend(batch.ids.tolist())
            if isinstance(batch, ImageBatch):
                seen = drawn(objective, batch)
            else:
                row, counted = text_targets(objective, batch)
                seen = [row]
                targets += counted.sum().item()
            for sample in zip(*seen, strict=True):
                views.append(
                    hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in sample)).hexdigest()
                )
            yield batch

    stream = watched(iter(setup.loader))
    for _ in range(batches):
        setup.state.optimizer.zero_grad()
        sums = global_gradient(setup, stream, PROGRESS)
    gradient = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return {
        "ids": ids,
        "views": views,
        "targets": targets,
        "gradient": gradient,
        "loss": sums.loss,
        "count": sums.count,
        "norm": sums.norm,
        "metrics": sums.metrics,
        "statistics": sums.statistics,
        "running": {name: b.clone() for name, b in objective.named_buffers() if ".running_" in name},
    }


def drawn(objective: Objective, batch: ImageBatch) -> list[Tensor]:
    """What the objective makes of a batch's keys, sample by sample."""
    found = objective.view(batch)  # type: ignore[operator]
    if isinstance(found, torch.Tensor):
        return [found]
    return [x.transpose(0, 1) if x.ndim == 5 else x for _, x in sorted(found.items())]


def text_targets(objective: torch.nn.Module, batch: TextBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What a text objective's encoder sees of each row, and which tokens count."""
    if isinstance(objective, Hybrid):
        objective = objective.masked_part
    if isinstance(objective, ReplacedToken):
        objective = objective.generator
    if isinstance(objective, MaskedLanguage):
        return objective.masked(batch, PROGRESS)
    assert isinstance(objective, NextToken)
    return batch.tokens, objective.targets(batch.tokens, batch.documents)[1]


if __name__ == "__main__":
    out, *recipes = map(Path, sys.argv[1:])
    torch.save([observe(load_recipe(path), out.parent) for path in recipes], out)
