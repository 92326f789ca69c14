"""Whether features still tell pictures apart, in numbers and in words."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FLAT = 0.05
"""Spread below which features count as equal; untrained encoders lie above 0.2."""
NARROW = 1.5
"""Effective rank below which features count as one direction; untrained encoders lie above 7."""


def effective_rank(features: Tensor) -> float:
    """RankMe: the exponential of the entropy of the singular values of (n, d), between 1 and min(n, d).

    Garrido et al. 2023, equations 1 and 2, from the eigenvalues of the smaller Gram matrix in float64.
    """
    x = features.double()
    gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.special.entr(shares).sum().exp().item()


def spread(features: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of normalised features (n, d), times sqrt(d): a scalar.

    1 where they point everywhere alike, 0 where all are equal (Chen and He 2021, section 4.1).
    """
    directions = F.normalize(features.float(), dim=1)
    return directions.std(dim=0, correction=0).mean() * features.shape[1] ** 0.5


def alarm(values: dict[str, float]) -> str | None:
    """What is wrong with features by their metrics, with what to try; None where nothing is.

    Reads `feature_spread` and `effective_rank` of the encoder's features, and how far student and teacher agree,
    where the objective measures it: `agreement`, or BYOL's `similarity`.
    """
    signs = []
    if values.get("feature_spread", 1.0) < FLAT:
        signs.append(f"all pictures get almost the same features (spread {values['feature_spread']:.3f} of 1)")
    if values.get("effective_rank", 2 * NARROW) < NARROW:
        signs.append(f"features lie along one direction (effective rank {values['effective_rank']:.1f})")
    if not signs:
        return None
    agreement = values.get("agreement", values.get("similarity", 0.0))
    if agreement > 0.99:
        signs.append(f"teacher and student agree on everything ({agreement:.3f})")
    return (
        f"collapse: {', and '.join(signs)}; start anew with a lower optimizer.lr or a larger train.batch_size, and "
        "check the teacher's momentum and temperature"
    )
