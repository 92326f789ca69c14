"""Evaluation on held-out samples, the same ones each time, split over the processes."""

from __future__ import annotations

import math

import numpy as np
import torch
from accelerate.utils import gather_object

from data.dataset import Ints
from data.keyed import hash64
from data.loader import sequential
from data.mixture import Samples
from data.tokenizer import load, token_bytes
from pretrain.collapse import effective_rank, spread
from pretrain.encoders.vision import VisionConfig
from pretrain.objectives.next_token import NextToken
from pretrain.probe import Probe, labelled_subset, subset
from pretrain.setup import Setup
from pretrain.text_metrics import byte_sums

WATCH_SHARE = 100
"""Samples trained on for each one that is looked at: a forward pass costs less than a step on the same sample."""


def cadence(setup: Setup) -> int:
    """Steps between two evaluations: the recipe's, or so many that watching costs less than 2 % of the run."""
    watch, data = setup.recipe.watch, setup.data
    if watch.evaluate_every is not None:
        return watch.evaluate_every
    held_out = data.train if data.validation is None else data.validation
    samples = 2 * min(watch.evaluate_samples, len(held_out))  # once for the loss, once for features or bits
    if isinstance(setup.recipe.encoder, VisionConfig):
        samples += min(watch.knn_samples, len(data.train))
    return max(1, math.ceil(WATCH_SHARE * samples / setup.recipe.train.batch_size))


@torch.no_grad()
def evaluate(setup: Setup) -> dict[str, float]:
    """Loss and metrics on `watch.evaluate_samples` held-out samples; how pictures lie in feature space.

    Features are those of the encoder that would be exported: the average where one is kept. Their spread and
    effective rank need no labels and no held-out samples; kNN accuracy needs both.
    """
    values: dict[str, float] = {}
    validation = setup.data.validation
    for name, samples in setup.data.watched.items():
        values |= _held_out_loss(setup, samples, _mine(setup, samples), name)
    if validation is not None:
        mine = _mine(setup, validation)
        values |= _held_out_loss(setup, validation, mine, "validation")
        if isinstance(setup.state.objective, NextToken):
            values["validation_bits_per_byte"] = _bits_per_byte(setup, setup.state.objective, validation, mine)
    if isinstance(setup.recipe.encoder, VisionConfig):
        values |= _features(setup, setup.recipe.encoder)
    return values


def _mine(setup: Setup, samples: Samples) -> Ints:
    """This process's share of the samples to look at, the same ones each time."""
    ids = samples.all_ids()
    ids = np.sort(ids[np.argsort(hash64(ids), kind="stable")[: setup.recipe.watch.evaluate_samples]])
    return ids[setup.accelerator.process_index :: setup.accelerator.num_processes]


def _features(setup: Setup, config: VisionConfig) -> dict[str, float]:
    data, watch = setup.data, setup.recipe.watch
    probe = Probe(setup.state.encoder(), config, setup.recipe.data.canvas, setup.accelerator)
    held_out = data.validation or data.train
    ids = labelled_subset(held_out, watch.evaluate_samples)
    labelled = len(ids) > 0
    queries = probe.features(held_out, ids if labelled else subset(held_out.all_ids(), watch.evaluate_samples))
    values = {"effective_rank": effective_rank(queries[0]), "feature_spread": spread(queries[0]).item()}
    bank = labelled_subset(data.train, watch.knn_samples)
    if labelled and len(bank) and data.validation is not None:
        stored = probe.features(data.train, bank)
        values["knn_accuracy"] = probe.knn_accuracy(stored, queries, watch.knn_neighbours, watch.knn_temperature)
    return values


def _held_out_loss(setup: Setup, samples: Samples, mine: Ints, prefix: str) -> dict[str, float]:
    recipe, accelerator, objective = setup.recipe, setup.accelerator, setup.state.objective
    objective.eval()
    totals: dict[str, float] = {"loss": 0.0, "count": 0.0}
    held_out = sequential(samples, setup.loader.microbatch, canvas=recipe.data.canvas, ids=mine)
    for batch in setup.preemption.until_asked(held_out):
        output = objective(batch.to(accelerator.device), 1.0)
        values = {"loss": output.loss_sum, "count": output.target_count} | output.metrics
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    objective.train()
    everyone = gather_object([totals])
    names = sorted({name for each in everyone for name in each})
    sums = {name: math.fsum(each.get(name, 0.0) for each in everyone) for name in names}
    count = max(sums.pop("count"), 1.0)
    found = {f"{prefix}_{name}": value / count for name, value in sums.items()}
    if recipe.encoder.kind == "text":
        found[f"{prefix}_perplexity"] = math.exp(min(found[f"{prefix}_loss"], 50.0))
    return found


def _bits_per_byte(setup: Setup, objective: NextToken, validation: Samples, mine: Ints) -> float:
    """Of the text itself, whatever its tokens: comparable between vocabularies."""
    lengths = torch.from_numpy(token_bytes(load(validation.folder))).to(setup.accelerator.device)
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in setup.preemption.until_asked(sequential(validation, setup.loader.microbatch, ids=mine)):
        sums += byte_sums(objective, batch.to(setup.accelerator.device), lengths).cpu()
    nats, count = (math.fsum(part) for part in zip(*gather_object([sums.tolist()]), strict=True))
    return nats / math.log(2) / max(count, 1.0)
