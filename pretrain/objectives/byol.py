"""BYOL (Grill et al., "Bootstrap your own latent", NeurIPS 2020): predict what a slow teacher sees in another view."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightly.models.modules.heads import BYOLPredictionHead, BYOLProjectionHead
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.encoders.vision import VisionConfig
from pretrain.objectives.protocol import Output, Tensors
from pretrain.objectives.teacher import Teacher
from pretrain.objectives.two_views import TwoViews, TwoViewsConfig, byol_views
from pretrain.schedules import cosine
from pretrain.views import ViewConfig


class BYOLConfig(TwoViewsConfig):
    """BYOL's hyperparameters; the defaults are the paper's (section 3.3, appendix B)."""

    name: Literal["byol"] = "byol"
    views: list[ViewConfig] = Field(default_factory=byol_views, min_length=1)
    """Two views, which differ in blur and solarisation (table 6)."""
    momentum: float = Field(default=0.996, ge=0, le=1)
    """Of the teacher at the start; rises to 1 by a cosine."""
    hidden_width: int = Field(default=4096, ge=1)
    """Of the heads' hidden layer."""
    projection_width: int = Field(default=256, ge=1)
    """Of projections and predictions."""
    export: Literal["student", "teacher"] = "student"
    """Which encoder is evaluated and exported: the student (section 3.1), or its average."""


class BYOL(TwoViews):
    """Student: encoder, projector, predictor; teacher: averages of the first two."""

    def __init__(self, config: BYOLConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config, vision, encoder)
        self.config = config
        self.projector = BYOLProjectionHead(self.width, config.hidden_width, config.projection_width)
        self.predictor = BYOLPredictionHead(config.projection_width, config.hidden_width, config.projection_width)
        self.teacher = Teacher(encoder=self.encoder, projector=self.projector)

    def observe(self, views: Tensors, progress: float) -> Tensors:
        """The teacher's `targets`, before its projection: (b, 2, d)."""
        encoder: Any = self.teacher.encoder
        with torch.no_grad():
            return {"targets": torch.stack([encoder(view) for view in views["views"]], dim=1)}

    def compare(self, embeddings: Tensors, progress: float) -> Output:
        """Squared distance of unit vectors, both ways (equations 2 and 3), summed over samples. Metric:
        `similarity`, the mean cosine of prediction and target."""
        cosines: list[Tensor] = []
        projector: Any = self.teacher.projector
        for seen, other in ((0, 1), (1, 0)):
            predicted = self.predictor(self.projector(embeddings["features"][:, seen])).float()
            with torch.no_grad():
                target = projector(embeddings["targets"][:, other]).float()
            cosines.append(F.cosine_similarity(predicted, target).sum())
        count = cosines[0].new_tensor(float(len(embeddings["targets"])))
        both_ways = cosines[0] + cosines[1]
        return Output(4.0 * count - 2.0 * both_ways, count, {"similarity": both_ways.detach() / 2})

    def after_step(self, progress: float, statistics: Tensors) -> None:
        """The teacher follows."""
        momentum = cosine(progress, self.config.momentum, 1.0)
        self.teacher.follow(momentum, encoder=self.encoder, projector=self.projector)

    def exported(self) -> nn.Module:
        return self.encoder if self.config.export == "student" else self.teacher.get_submodule("encoder")
