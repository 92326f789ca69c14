"""Weights of an ensemble's members, chosen on labelled items that no member was trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data.keyed import hash64
from finetune.labelled_data import LabelledData
from finetune.members import Member
from finetune.samples import Ints
from finetune.settings import Settings
from finetune.targets import IGNORED, TINY, Floats, Target
from finetune.targets_vector import Regression

PLACES = 2**20
"""Words or pixels that weights are chosen on at most; a fixed choice of as many from each item."""
_ROUNDS = 1000
_CHOICE = 0x9A7C


def best_weights(data: LabelledData, members: Sequence[Member], settings: Settings) -> list[float]:
    """The weights (they sum to 1, none is negative) of the mean that fits the truth best.

    Where members give probabilities (of classes, of each label's presence, of words' tags, of pixels' classes), the
    likeliest ones; of quantities, those of least squared error in standard deviations.
    """
    columns = []
    for positions, truth, each in data.said(members, settings):
        if data.target.dense:
            truth = thinned(truth, positions, max(1, PLACES // len(data.common)))
        columns.append(torch.stack([_column(data.target, said, truth) for said in each], dim=1).cpu().numpy())
    found = np.concatenate(columns)
    return least_squares_weights(found) if isinstance(data.target, Regression) else likeliest_weights(found)


def likeliest_weights(likelihoods: Floats) -> list[float]:
    """The mixture weights under which what is true is likeliest: the global optimum, by EM.

    Args:
        likelihoods: (places, members), what each member gives to what is true at each place.

    The log likelihood is concave in the weights; expectation-maximisation (Dempster et al. 1977) keeps them
    positive and summing to 1 and never makes it smaller.
    """
    true = np.maximum(likelihoods, TINY)
    weights = np.full(true.shape[1], 1 / true.shape[1])
    for _ in range(_ROUNDS):
        shares = true * weights
        new = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
        done = np.abs(new - weights).max() < 1e-7
        weights = new
        if done:
            break
    return [float(weight) for weight in weights / weights.sum()]


def least_squares_weights(errors: Floats) -> list[float]:
    """The weights whose mean of errors (places, members) has the least square.

    Non-negative least squares (Lawson and Hanson 1974) with one more equation, that the weights sum to 1: scaled to
    do so, its solution is the optimum among weights that do, for by how much a direction misses the equation only
    grows with its error.
    """
    from scipy.optimize import nnls

    scaled = np.vstack([errors / np.sqrt(len(errors)), np.ones(errors.shape[1])])
    weights, _ = nnls(scaled, np.append(np.zeros(len(errors)), 1.0))
    return [float(weight) for weight in weights / weights.sum()]


def thinned(truth: Tensor, positions: Ints, most: int) -> Tensor:
    """Truth (b, …) of a dense target in which at most `most` places of each item are known: a fixed choice."""
    flat = truth.reshape(len(truth), -1).clone()
    for row, position in zip(flat, positions.tolist(), strict=True):
        known = torch.nonzero(row != IGNORED)[:, 0].cpu().numpy()
        if len(known) > most:
            order = np.argsort(hash64(_CHOICE, position, known), kind="stable")
            row[torch.from_numpy(known[order[most:]]).to(row.device)] = IGNORED
    return flat.view(truth.shape)


def _column(target: Target, said: Tensor, truth: Tensor) -> Tensor:
    """float64 (places,): likelihoods, or errors in standard deviations."""
    if isinstance(target, Regression):
        return target.errors(said, truth)
    return target.likelihoods(said, truth).double()
