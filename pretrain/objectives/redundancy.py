"""Redundancy reduction: views agree, and no feature repeats another.

Barlow Twins (Zbontar et al., ICML 2021) and VICReg (Bardes, Ponce and LeCun, ICLR 2022). Both losses are functions of
second moments of the whole global batch, added up over processes. lightly's Barlow Twins normalises each process's
samples by themselves, so its loss changes with the number of processes; on one process tests hold the two equal.
"""

from __future__ import annotations

from typing import Literal

import torch
from lightly.models.modules.heads import BarlowTwinsProjectionHead
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.encoders.vision import VisionConfig
from pretrain.norm import moments, standardise
from pretrain.objectives.protocol import Output, Tensors
from pretrain.objectives.two_views import TwoViews, TwoViewsConfig, byol_views, mean_output
from pretrain.views import ViewConfig


class _RedundancyConfig(TwoViewsConfig):
    views: list[ViewConfig] = Field(default_factory=byol_views, min_length=1)
    """Two views; both papers take BYOL's, or VICReg a symmetric form of them."""
    hidden_width: int = Field(default=8192, ge=1)
    """Of the projection head's two hidden layers."""
    projection_width: int = Field(default=8192, ge=2)
    """Of the projections."""


class BarlowTwinsConfig(_RedundancyConfig):
    """Barlow Twins' hyperparameters; the defaults are the paper's (section 2.2)."""

    name: Literal["barlow_twins"] = "barlow_twins"
    redundancy_weight: float = Field(default=0.005, ge=0)
    """Of the off-diagonal terms."""


class VICRegConfig(_RedundancyConfig):
    """VICReg's hyperparameters; the defaults are the paper's (section 4.2)."""

    name: Literal["vicreg"] = "vicreg"
    invariance_weight: float = Field(default=25.0, ge=0)
    """Of the distance between views."""
    variance_weight: float = Field(default=25.0, ge=0)
    """Of the hinge that keeps each feature's deviation above one."""
    covariance_weight: float = Field(default=1.0, ge=0)
    """Of the squared covariances."""


class _Redundancy(TwoViews):
    def __init__(self, config: _RedundancyConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config, vision, encoder)
        self.projector = BarlowTwinsProjectionHead(self.width, config.hidden_width, config.projection_width)

    def project(self, embeddings: Tensors) -> tuple[Tensor, Tensor]:
        """Projections of both views, float32 (b, d)."""
        features = embeddings["features"]
        return self.projector(features[:, 0]).float(), self.projector(features[:, 1]).float()


class BarlowTwins(_Redundancy):
    """The cross-correlation of the views' features shall be the identity."""

    def __init__(self, config: BarlowTwinsConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config, vision, encoder)
        self.redundancy_weight = config.redundancy_weight

    def compare(self, embeddings: Tensors, progress: float) -> Output:
        """Equation 1 over the global batch; targets are samples. Metric: `diagonal`, the mean correlation of a
        feature with itself."""
        first, second = self.project(embeddings)
        with torch.autocast(first.device.type, enabled=False):
            mean, variance, count = moments(first, self.training)
            other_mean, other_variance, _ = moments(second, self.training)
            first = standardise(first, mean, variance)
            second = standardise(second, other_mean, other_variance)
            correlation = self.total(first.T @ second) / count
            diagonal = correlation.diagonal()
            loss = (diagonal - 1.0).square().sum() + self.redundancy_weight * off_diagonal(correlation)
        return mean_output(loss, len(first), {"diagonal": diagonal.mean()})


class VICReg(_Redundancy):
    """Variance kept, covariance removed, views brought together."""

    def __init__(self, config: VICRegConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config, vision, encoder)
        self.config = config

    def compare(self, embeddings: Tensors, progress: float) -> Output:
        """Equation 6 over the global batch; targets are samples. Metrics: its terms, unweighted."""
        first, second = self.project(embeddings)
        samples = len(first)
        with torch.autocast(first.device.type, enabled=False):
            invariance = self.total((first - second).square().mean(dim=1).sum()[None])[0]
            terms = [self._spread(view) for view in (first, second)]
            invariance = invariance / terms[0][2]
            variance, covariance = (terms[0][0] + terms[1][0]) / 2, terms[0][1] + terms[1][1]
            config = self.config
            loss = config.invariance_weight * invariance + config.variance_weight * variance
            loss = loss + config.covariance_weight * covariance
        metrics = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return mean_output(loss, samples, metrics)

    def _spread(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The hinge on deviations, the squared covariances per feature, and the samples of the global batch."""
        mean, _, count = moments(x, self.training)
        centred = x - mean
        covariance = self.total(centred.T @ centred) / (count - 1.0).clamp(min=1.0)
        deviation = torch.sqrt(covariance.diagonal() + 1e-4)
        return F.relu(1.0 - deviation).mean(), off_diagonal(covariance) / x.shape[1], count


def off_diagonal(matrix: Tensor) -> Tensor:
    """Sum of the squared elements of a square matrix off its diagonal."""
    return matrix.square().sum() - matrix.diagonal().square().sum()
