"""The ways to use an encoder with few labels, cheap to dear: knn, linear, full; and scratch, the control."""

from __future__ import annotations

import copy
import difflib
from functools import partial

from accelerate import Accelerator
from torch import Tensor

from data.errors import UserError
from finetune.encoder import Encoder, fresh
from finetune.model import TaskModel
from finetune.probe import fit_linear, fit_neighbours
from finetune.rates import UNTRAINED, learning_rates
from finetune.samples import Samples
from finetune.settings import STRATEGIES, Settings, Strategy
from finetune.train import Training

FROZEN: tuple[Strategy, ...] = ("knn", "linear")
"""Strategies that read features and leave the encoder as it is."""


def strategy_from(name: str) -> Strategy:
    """A known strategy; raises `UserError` for any other name."""
    for strategy in STRATEGIES:
        if name == strategy:
            return strategy
    near = difflib.get_close_matches(name.lower(), STRATEGIES, n=1)
    hint = f"did you mean {near[0]!r}? There are" if near else "choose one of"
    raise UserError(f"there is no strategy {name!r}; {hint} {', '.join(STRATEGIES)}")


def fit_frozen(
    strategy: Strategy,
    encoder: Encoder,
    features: Tensor,
    labels: Tensor,
    classes: list[str],
    seed: int,
    settings: Settings,
) -> TaskModel:
    """A head on features (n, d) of the frozen encoder; `about["chosen"]` says what was chosen."""
    if strategy == "knn":
        head, chosen = fit_neighbours(features, labels, len(classes), seed, settings.k, settings.temperature)
        return TaskModel(encoder, head, classes, {"chosen": chosen})
    linear, chosen = fit_linear(features, labels, len(classes), seed, settings.strength, settings.standardize)
    return TaskModel(encoder, linear, classes, {"chosen": chosen})


def fit_trained(
    strategy: Strategy,
    encoder: Encoder,
    samples: Samples,
    classes: list[str],
    seed: int,
    settings: Settings,
    accelerator: Accelerator,
) -> TaskModel:
    """Encoder and head trained together, from the encoder's weights (`full`) or untrained ones (`scratch`).

    The given encoder stays as it is.
    """
    if not any(True for _ in encoder.parameters()):
        raise UserError(f"an encoder without weights has nothing to train; strategy {strategy!r} needs some")
    if strategy == "scratch":
        start = partial(fresh, encoder, seed)
        # From scratch no layer has anything to keep.
        settings = settings.model_copy(update={"layer_decay": 1.0})
    else:
        start = partial(_copy, encoder)
    training = Training(start, samples, len(classes), seed, settings, accelerator)
    trained, head, chosen = training.fit(UNTRAINED if strategy == "scratch" else learning_rates(encoder.info))
    return TaskModel(trained, head, classes, {"chosen": chosen})


def _copy(encoder: Encoder) -> Encoder:
    return copy.deepcopy(encoder).requires_grad_(True)
