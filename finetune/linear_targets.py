"""Linear heads on frozen features for tasks that are no classification of samples; for that see `finetune.probe`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.keyed import hash64
from finetune.heads import LinearHead, standardization
from finetune.probe import FALLBACK_STRENGTH, STRENGTHS, logistic
from finetune.targets import Target
from finetune.targets_vector import MultiLabel, Regression

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse penalties to choose among for quantities."""
MOST_ROWS = 20_000
"""Words or patches that a head is fitted on at most: a draw of whole samples."""
FOLDS = 5
"""Inner splits; above `FEW` samples only one of them is tried."""
FEW = 2000

Matrix = NDArray[np.float64]


def fit_linear_target(
    target: Target,
    features: Tensor,
    truth: Tensor,
    owners: Tensor,
    seed: int,
    strength: float | None = None,
    standardize: bool = True,
) -> tuple[LinearHead, dict[str, Any]]:
    """A linear head with an L2 penalty on features (m, d), by scikit-learn; takes what `flat_features` gives.

    Several labels: one logistic regression each. Quantities: ridge regression of the standardised values.
    Words and patches: multinomial logistic regression. Unless given, the penalty `1 / strength` is the one of
    least loss on held-out samples of these same (all rows of a sample are on one side).

    Returns:
        The head, float32, and what was chosen.
    """
    rows = _rows(owners, seed) if target.dense else torch.arange(len(owners))
    features, truth, owners = features[rows], truth[rows], owners[rows]
    mean, scale = standardization(features)
    if not standardize:
        mean, scale = torch.zeros_like(mean), torch.ones_like(scale)
    inputs = ((features - mean) * scale).double().numpy()
    basis = None
    if inputs.shape[1] > inputs.shape[0]:
        # The best weights lie in the span of the samples (representer theorem): fitting there is the same, faster.
        basis = np.linalg.svd(inputs, full_matrices=False)[2]
        inputs = inputs @ basis.T
    if strength is None:
        strength = _choose(target, inputs, truth, owners.numpy(), seed)
    weight, bias = _solve(target, inputs, truth, strength)
    weight = weight if basis is None else weight @ basis
    head = LinearHead(features.shape[1], target.outputs)
    head.mean.copy_(mean)
    head.scale.copy_(scale)
    head.linear.weight.data.copy_(torch.from_numpy(weight))
    head.linear.bias.data.copy_(torch.from_numpy(bias))
    return head, {"strength": strength}


def _rows(owners: Tensor, seed: int) -> Tensor:
    """The rows of as many samples, in a random order of samples, as stay within `MOST_ROWS`; ascending."""
    known, counts = owners.unique(return_counts=True)
    order = np.argsort(hash64(seed, 0x9A7C, known.numpy()), kind="stable")
    taken = counts[torch.from_numpy(order)].cumsum(0) <= MOST_ROWS
    taken[0] = True
    return torch.isin(owners, known[torch.from_numpy(order)][taken]).nonzero()[:, 0]


def _choose(target: Target, inputs: Matrix, truth: Tensor, owners: NDArray[np.int64], seed: int) -> float:
    """The inverse penalty of least loss on held-out folds of samples."""
    known, member = np.unique(owners, return_inverse=True)
    count = min(FOLDS, len(known))
    if count < 2:
        return FALLBACK_STRENGTH
    ranks = np.empty(len(known), dtype=np.int64)
    ranks[np.argsort(hash64(seed, 0xF01D6, known), kind="stable")] = np.arange(len(known))
    fold = (ranks % count)[member]
    candidates = RIDGES if isinstance(target, Regression) else STRENGTHS
    losses = np.zeros(len(candidates))
    for number in range(count if len(known) <= FEW else 1):
        train, valid = fold != number, fold == number
        for i, strength in enumerate(candidates):
            weight, bias = _solve(target, inputs[train], truth[torch.from_numpy(train)], strength)
            outputs = torch.from_numpy(inputs[valid] @ weight.T + bias).float()
            losses[i] += float(target.row_loss(outputs, truth[torch.from_numpy(valid)])[0])
    return candidates[int(np.argmin(losses))]


def _solve(target: Target, inputs: Matrix, truth: Tensor, strength: float) -> tuple[Matrix, Matrix]:
    """Weights (outputs, d) and biases (outputs,)."""
    if isinstance(target, Regression):
        from sklearn.linear_model import Ridge

        model = Ridge(alpha=1 / strength).fit(inputs, target.standardized(truth).double().numpy())
        return model.coef_.reshape(target.outputs, -1), np.atleast_1d(model.intercept_)
    if isinstance(target, MultiLabel):
        # logistic() gives a row for absence and one for presence; a sigmoid takes their difference.
        pairs = [logistic(inputs, column.long().numpy(), 2, strength) for column in truth.unbind(dim=1)]
        weight = np.stack([w[1] - w[0] for w, _ in pairs])
        return weight, np.clip(np.array([b[1] - b[0] for _, b in pairs]), -_CERTAIN, _CERTAIN)
    return logistic(inputs, truth.numpy(), target.outputs, strength)


_CERTAIN = 15.0
"""Log odds given to a label that all samples have, or none: a finite loss where a held-out one differs."""
