"""Heads that sort features into prototypes, and how a teacher's assignments are kept from collapsing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PrototypeHead(nn.Module):
    """Three layers, unit length, cosines to prototypes (DINO: Caron et al. 2021, appendix C).

    The same function as lightly's `DINOProjectionHead` (a test holds them equal); that one's weight normalisation
    keeps a derived tensor in the module, which can neither be copied for a teacher nor compiled.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) / bottleneck**0.5)

    def forward(self, features: Tensor, frozen: bool = False) -> Tensor:
        """Cosines (…, prototypes) of features (…, d); `frozen` prototypes get a gradient of zero."""
        prototypes = F.normalize(self.prototypes, dim=1)
        if frozen:  # not None: other processes and the optimiser expect one
            prototypes = prototypes.detach() + 0.0 * prototypes
        return F.normalize(self.layers(features), dim=-1) @ prototypes.T.to(features.dtype)


def sinkhorn(logits: Tensor, temperature: float, total: Callable[[Tensor], Tensor], iterations: int = 3) -> Tensor:
    """Assignments that use all prototypes alike over the global batch (SwAV: Caron et al. 2020, section 3.1).

    Args:
        logits: cosines (n, prototypes) of this process's samples; n may differ between processes.
        total: sums a tensor over processes.

    Returns:
        float32 (n, prototypes), rows that add up to one.
    """
    # Logits are cosines, so nothing overflows; a common factor cancels.
    shares = torch.exp((logits.float() - 1.0) / temperature)
    for _ in range(iterations):
        used = total(shares.sum(dim=0))
        shares = shares / used.clamp(min=1e-12)
        shares = shares / shares.sum(dim=1, keepdim=True)
    return shares


def centred(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Sharpened assignments, less a running mean (DINO, section 3.1): float32 (…, prototypes)."""
    return ((logits.float() - center) / temperature).softmax(dim=-1)


def cross_entropy(assigned: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Of assignments (…, prototypes) and a student's logits: float32 (…)."""
    return -(assigned * F.log_softmax(logits.float() / temperature, dim=-1)).sum(dim=-1)


def koleo(features: Tensor, everyone: Tensor, place: int) -> Tensor:
    """Minus the log distance to the nearest neighbour, summed (KoLeo: Sablayrolles et al. 2019, equation 3).

    Args:
        features: (n, d), of length one; `everyone` (m, d) those of the global batch, ours from row `place` on.
    """
    if len(everyone) < 2:
        return features.sum() * 0.0
    with torch.no_grad():
        similarity = features @ everyone.T
        own = torch.arange(len(features), device=features.device)[:, None] + place
        nearest = similarity.scatter(1, own, -2.0).argmax(dim=1)
    return -torch.log(F.pairwise_distance(features, everyone[nearest], eps=1e-8) + 1e-8).sum()
