"""Strategies on frozen features: nearest neighbours, and a regularised logistic regression."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.keyed import hash64
from finetune.heads import LinearHead, NeighbourHead, standardization
from finetune.splits import folds

NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)
"""Values of k to choose among."""
QUERIES = 2000
"""Most training samples that are asked when k is chosen."""
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse L2 penalties C to choose among, weak features to strong (features are standardised)."""
FALLBACK_STRENGTH = 1e-1
"""C where no class has two labels."""
FEW = 5000
"""Up to so many labels every inner fold is tried, above it one."""


def fit_neighbours(
    features: Tensor, labels: Tensor, classes: int, seed: int, k: int | None = None, temperature: float = 0.07
) -> tuple[NeighbourHead, dict[str, Any]]:
    """A bank of the training features (n, d); k, unless given, is the best under leave-one-out on them.

    Returns the head and what was chosen.
    """
    head = NeighbourHead(features, labels, classes, k or 1, temperature)
    if k is None and len(labels) > 2:
        candidates = [k for k in NEIGHBOURS if k < len(labels)]
        asked = np.argsort(hash64(seed, 0x4E4E, np.arange(len(labels))), kind="stable")[:QUERIES]
        accuracies = head.leave_one_out(torch.from_numpy(np.sort(asked)).to(labels.device), candidates)
        head.k = candidates[int(np.argmax(accuracies))]
    return head, {"k": head.k, "temperature": temperature}


def fit_linear(
    features: Tensor,
    labels: Tensor,
    classes: int,
    seed: int,
    strength: float | None = None,
    standardize: bool = True,
) -> tuple[LinearHead, dict[str, Any]]:
    """Multinomial logistic regression with an L2 penalty on features (n, d), standardised or as they are.

    Unless given, the penalty `1 / strength` is chosen by cross-validation inside the training labels:
    highest accuracy, then lowest log loss. Where no class has two labels it is a fixed one.
    Returns the head and what was chosen.
    """
    mean, scale = standardization(features)
    if not standardize:
        mean, scale = torch.zeros_like(mean), torch.ones_like(scale)
    inputs = ((features - mean) * scale).double().numpy()
    targets = labels.numpy()
    basis = None
    if inputs.shape[1] > inputs.shape[0]:
        # The best weights lie in the span of the samples (representer theorem): fitting there is the same, faster.
        basis = np.linalg.svd(inputs, full_matrices=False)[2]
        inputs = inputs @ basis.T
    if strength is None:
        strength = _choose_strength(inputs, targets, classes, seed)
    weight, bias = logistic(inputs, targets, classes, strength)
    weight = weight if basis is None else weight @ basis
    head = LinearHead(features.shape[1], classes)
    head.mean.copy_(mean)
    head.scale.copy_(scale)
    head.linear.weight.data.copy_(torch.from_numpy(weight))
    head.linear.bias.data.copy_(torch.from_numpy(bias))
    return head, {"strength": strength}


def _choose_strength(inputs: NDArray[np.float64], targets: NDArray[np.int64], classes: int, seed: int) -> float:
    """The inverse penalty that does best on held-out folds of these same labels."""
    count = min(5, int(np.bincount(targets).max()))
    if count < 2:
        return FALLBACK_STRENGTH
    number = folds(targets, count, seed)
    tried = range(count) if len(targets) <= FEW else range(1)
    hits, losses = np.zeros(len(STRENGTHS)), np.zeros(len(STRENGTHS))
    for fold in tried:
        train, valid = number != fold, number == fold
        if not valid.any() or len(np.unique(targets[train])) < 2:
            continue
        for i, strength in enumerate(STRENGTHS):
            weight, bias = logistic(inputs[train], targets[train], classes, strength)
            logits = inputs[valid] @ weight.T + bias
            hits[i] += (logits.argmax(axis=1) == targets[valid]).sum()
            shifted = logits - logits.max(axis=1, keepdims=True)
            chosen = np.take_along_axis(shifted, targets[valid][:, None], axis=1)[:, 0]
            losses[i] += (np.log(np.exp(shifted).sum(axis=1)) - chosen).sum()
    if not losses.any():
        return FALLBACK_STRENGTH
    return STRENGTHS[min(range(len(STRENGTHS)), key=lambda i: (-hits[i], losses[i]))]


def logistic(
    inputs: NDArray[np.float64], targets: NDArray[np.int64], classes: int, strength: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights (classes, d) and biases (classes,) fitted by L-BFGS.

    A class without samples is never predicted.
    """
    from sklearn.linear_model import LogisticRegression

    present = np.unique(targets)
    weight, bias = np.zeros((classes, inputs.shape[1])), np.full(classes, -1e4)
    if len(present) == 1:
        bias[present] = 0.0
        return weight, bias
    with warnings.catch_warnings():
        # An unfinished optimisation at a weak penalty is a candidate like any other.
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=strength, max_iter=500).fit(inputs, targets)
    if len(present) == 2:  # one row for two classes: p = sigmoid(w x + b)
        weight[present] = np.concatenate([-model.coef_, model.coef_]) / 2
        bias[present] = np.concatenate([-model.intercept_, model.intercept_]) / 2
    else:
        weight[present], bias[present] = model.coef_, model.intercept_
    return weight, bias
