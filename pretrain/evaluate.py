"""Evaluation on held-out samples, the same ones each time, split over the processes."""

from __future__ import annotations

import math

import numpy as np
import torch
from accelerate.utils import gather_object

from data.dataset import Ints, ShardedDataset
from data.keyed import hash64
from data.loader import sequential
from data.tokenizer import load, token_bytes
from pretrain.encoders.vision import VisionConfig
from pretrain.objectives.next_token import NextToken
from pretrain.probe import online_knn
from pretrain.setup import Setup
from pretrain.text_metrics import byte_sums


@torch.no_grad()
def evaluate(setup: Setup) -> dict[str, float]:
    """Loss and metrics on `watch.evaluate_samples` held-out samples, kNN accuracy where there are labels.

    The kNN probe looks at the encoder that would be exported: the average where one is kept.
    """
    recipe, data, watch = setup.recipe, setup.data, setup.recipe.watch
    if data.validation is None:
        return {}
    ids = data.validation.all_ids()
    ids = np.sort(ids[np.argsort(hash64(ids), kind="stable")[: watch.evaluate_samples]])
    mine = ids[setup.accelerator.process_index :: setup.accelerator.num_processes]
    values = _held_out_loss(setup, data.validation, mine)
    if isinstance(setup.state.objective, NextToken):
        values["validation_bits_per_byte"] = _bits_per_byte(setup, setup.state.objective, data.validation, mine)
    if isinstance(recipe.encoder, VisionConfig) and watch.knn_samples:
        accuracy = online_knn(
            setup.state.encoder(),
            data.train,
            data.validation,
            recipe.encoder,
            recipe.data.canvas,
            watch.knn_samples,
            watch.evaluate_samples,
            watch.knn_neighbours,
        )
        if accuracy is not None:
            values["knn_accuracy"] = accuracy
    return values


def _held_out_loss(setup: Setup, validation: ShardedDataset, mine: Ints) -> dict[str, float]:
    recipe, accelerator, objective = setup.recipe, setup.accelerator, setup.state.objective
    objective.eval()
    totals: dict[str, float] = {"loss": 0.0, "count": 0.0}
    for batch in sequential(validation, setup.loader.microbatch, canvas=recipe.data.canvas, ids=mine):
        output = objective(batch.to(accelerator.device), 1.0)
        values = {"loss": output.loss_sum, "count": output.target_count} | output.metrics
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    objective.train()
    everyone = gather_object([totals])
    names = sorted({name for each in everyone for name in each})
    sums = {name: math.fsum(each.get(name, 0.0) for each in everyone) for name in names}
    count = max(sums.pop("count"), 1.0)
    found = {"validation_" + name: value / count for name, value in sums.items()}
    if recipe.encoder.kind == "text":
        found["validation_perplexity"] = math.exp(min(found["validation_loss"], 50.0))
    return found


def _bits_per_byte(setup: Setup, objective: NextToken, validation: ShardedDataset, mine: Ints) -> float:
    """Of the text itself, whatever its tokens: comparable between vocabularies."""
    lengths = torch.from_numpy(token_bytes(load(validation.folder))).to(setup.accelerator.device)
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in sequential(validation, setup.loader.microbatch, ids=mine):
        sums += byte_sums(objective, batch.to(setup.accelerator.device), lengths).cpu()
    nats, count = (math.fsum(part) for part in zip(*gather_object([sums.tolist()]), strict=True))
    return nats / math.log(2) / max(count, 1.0)
