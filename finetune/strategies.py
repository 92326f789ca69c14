"""The ways to use an encoder with few labels, cheap to dear; `WAYS` and `HEADS` say what each does."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data.errors import UserError
from finetune.adapters import adapt, adapted, merge, require_effect
from finetune.encoder import Encoder, fresh
from finetune.heads import LinearHead
from finetune.judge import flat_features
from finetune.linear_targets import fit_linear_target
from finetune.model import TaskModel
from finetune.probe import fit_linear, fit_neighbours
from finetune.rates import ADAPTERS, FIXED_ADAPTERS, UNTRAINED, learning_rates
from finetune.samples import Samples
from finetune.settings import STRATEGIES, Settings, Strategy
from finetune.targets_class import Classification
from finetune.train import Trace, Training
from finetune.trained_head import Rows, fit_head
from finetune.unfreezing import unfreezing

FROZEN: tuple[Strategy, ...] = ("knn", "linear", "frozen")
"""Strategies that read features and leave the encoder as it is: neighbours, a logistic regression, a head trained
by steps."""


@dataclass(frozen=True)
class Way:
    """How encoder and head are trained together."""

    start: Callable[[Encoder, int, Settings], Encoder]
    """The encoder to be trained, its `requires_grad` flags saying what of it; the given one stays as it is."""
    adapts: bool = False
    """Whether low-rank adapters train, in place of the weights."""
    rates: Callable[[dict[str, Any]], tuple[float, ...]] = learning_rates
    """Peak learning rates to choose among, from what the export says of its pre-training."""
    layered: bool = True
    """Whether layers learn slower the lower they are (`layer_decay`)."""
    probed: bool = False
    """Whether training begins from a linear probe instead of a small random head."""
    kept: bool = True
    """Whether training begins at what the given encoder computes."""
    gradual: bool = False
    """Whether layers join one by one, from the top."""


def _whole(encoder: Encoder, seed: int, settings: Settings) -> Encoder:
    return copy.deepcopy(encoder).requires_grad_(True)


def _untrained(encoder: Encoder, seed: int, settings: Settings) -> Encoder:
    return fresh(encoder, seed)


def _adapted(encoder: Encoder, seed: int, settings: Settings, dora: bool = False) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        copied = copy.deepcopy(encoder).cpu()
        return adapt(copied, settings.rank, settings.alpha, settings.dropout, settings.target_modules, dora)


_adapter_rates = partial(learning_rates, shares=ADAPTERS, fixed=FIXED_ADAPTERS)

WAYS: dict[Strategy, Way] = {
    "lora": Way(_adapted, adapts=True, rates=_adapter_rates, layered=False),
    "dora": Way(partial(_adapted, dora=True), adapts=True, rates=_adapter_rates, layered=False),
    "lp-ft": Way(_whole, probed=True),
    "gradual": Way(_whole, gradual=True),
    "full": Way(_whole),
    "scratch": Way(
        _untrained, rates=lambda info: UNTRAINED, layered=False, kept=False
    ),  # no layer has anything to keep
}
"""Hu et al. 2022; Liu et al. 2024; Kumar et al. 2022 (linear probe, then full); Howard and Ruder 2018; every weight;
every weight from untrained ones, the control."""


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
        bank, chosen = fit_neighbours(features, labels, len(classes), seed, settings.k, settings.temperature)
        return TaskModel(encoder, bank, classes, {"chosen": chosen})
    if strategy == "linear":
        linear, chosen = fit_linear(features, labels, len(classes), seed, settings.strength, settings.standardize)
        return TaskModel(encoder, linear, classes, {"chosen": chosen})
    rows = Rows(features, labels, np.arange(len(labels)), labels.numpy())
    head, chosen = fit_head(rows, Classification(classes), seed, settings)
    return TaskModel(encoder, head, classes, {"chosen": chosen})


def fit_trained(
    strategy: Strategy,
    encoder: Encoder,
    samples: Samples,
    classes: list[str],
    seed: int,
    settings: Settings,
    accelerator: Accelerator,
    trace: Trace | None = None,
    known: Callable[[Samples], Tensor] | None = None,
) -> TaskModel:
    """Encoder and head trained together, as `WAYS` says; adapters end up in the encoder's weights and apart.

    The given encoder stays as it is. With a `trace` the last fit is a run that can be resumed. `known` gives pooled
    features (n, d) of samples by the given encoder where they are at hand already; they need not be computed again.
    """
    if not any(True for _ in encoder.parameters()):
        raise UserError(f"an encoder without weights has nothing to train; strategy {strategy!r} needs some")
    way = WAYS[strategy]
    start = partial(way.start, encoder, seed, settings)
    if way.adapts:
        require_effect(start(), samples, accelerator.device)
    known = known if way.kept else None
    head = partial(_probe, len(classes), seed, settings, accelerator, known) if way.probed else None
    before_step = unfreezing(settings.unfrozen_by) if way.gradual else None
    flat = settings if way.layered else settings.model_copy(update={"layer_decay": 1.0})
    training = Training(start, samples, len(classes), seed, flat, accelerator, head, before_step, known, trace)
    trained, trained_head, chosen = training.fit(way.rates(encoder.info))
    model = TaskModel(trained, trained_head, classes, {"chosen": chosen})
    if way.adapts:
        chosen["adapters"] = len(list(adapted(trained)))
        model.adapter = merge(trained)
    trained.requires_grad_(True)
    return model


def _probe(
    classes: int,
    seed: int,
    settings: Settings,
    accelerator: Accelerator,
    known: Callable[[Samples], Tensor] | None,
    encoder: Encoder,
    samples: Samples,
) -> LinearHead:
    """The linear strategy's head; a class without samples is improbable instead of impossible, so it can be learned."""
    if known is None:
        features, truth, owners = flat_features(encoder, samples, settings, accelerator)
    else:
        places = torch.arange(len(samples))
        features, truth, owners = known(samples), samples.truth(places.numpy()), places
    if isinstance(samples.target, Classification):
        head, _ = fit_linear(features, truth, classes, seed, settings.strength, settings.standardize)
        head.linear.bias.data.clamp_(min=-30.0)
    else:
        kept = settings.strength, settings.standardize
        head, _ = fit_linear_target(samples.target, features, truth, owners, seed, *kept)
    return head
