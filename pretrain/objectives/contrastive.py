"""Contrastive learning: a view finds its partner among the global batch's.

SimCLR (Chen et al., "A simple framework for contrastive learning of visual representations", ICML 2020) and MoCo v3
(Chen, Xie and He, "An empirical study of training self-supervised vision transformers", ICCV 2021), the latter with
an optional queue of past keys (MoCo: He et al., CVPR 2020).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from lightly.models.modules.heads import MoCoProjectionHead, SimCLRProjectionHead
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.encoders.tokens import require_vit
from pretrain.encoders.vision import VisionConfig
from pretrain.objectives.protocol import Output, Tensors
from pretrain.objectives.teacher import Teacher
from pretrain.objectives.two_views import TwoViews, TwoViewsConfig, byol_views
from pretrain.schedules import cosine
from pretrain.views import ViewConfig


class SimCLRConfig(TwoViewsConfig):
    """SimCLR's hyperparameters; the defaults are the paper's for ImageNet."""

    name: Literal["simclr"] = "simclr"
    temperature: float = Field(default=0.1, gt=0)
    """Of the softmax over similarities (as in the authors' README; there 0.5 on CIFAR-10)."""
    hidden_width: int = Field(default=2048, ge=1)
    """Of the projection head's hidden layers."""
    projection_width: int = Field(default=128, ge=1)
    """Of the projections that are compared (section 2.1)."""
    projection_layers: int = Field(default=2, ge=2)
    """Linear layers of the projection head: 2 (section 4.2); 3 in SimCLR v2."""


class SimCLR(TwoViews):
    """Both views of all samples are told apart: normalised temperature-scaled cross-entropy (equation 1)."""

    one_pass: ClassVar = True

    def __init__(self, config: SimCLRConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config, vision, encoder)
        self.temperature = config.temperature
        widths = (self.width, config.hidden_width, config.projection_width, config.projection_layers)
        self.projector = SimCLRProjectionHead(*widths)

    def compare(self, embeddings: Tensors, progress: float) -> Output:
        """Targets are views: two a sample. Metric: `accuracy` of finding the partner."""
        projected = self.projector(embeddings["features"].transpose(0, 1).flatten(0, 1))
        first, second = F.normalize(projected.float(), dim=1).chunk(2)
        loss, right = nt_xent(
            first, second, self.everyone(first), self.everyone(second), self.place(first), self.temperature
        )
        return Output(loss, loss.new_tensor(2.0 * len(first)), {"accuracy": right})


def nt_xent(
    first: Tensor, second: Tensor, firsts: Tensor, seconds: Tensor, place: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """NT-Xent, summed over this process's 2n views, and how many found their partner (no gradient).

    One matrix product, where lightly's `NTXentLoss` takes four; a test holds the two equal.

    Args:
        first, second: (n, d) unit vectors, views of the same samples in the same order.
        firsts, seconds: (m, d) those of the global batch, among them ours from row `place` on.
    """
    count, others = len(first), len(firsts)
    with torch.autocast(first.device.type, enabled=False):
        logits = torch.cat([first, second]) @ torch.cat([firsts, seconds]).T / temperature
    own = torch.arange(count, device=first.device) + place
    itself = torch.cat([own, own + others])[:, None]
    logits = logits.scatter(1, itself, float("-inf"))
    partner = torch.cat([own + others, own])
    return F.cross_entropy(logits, partner, reduction="sum"), (logits.argmax(1) == partner).sum().float()


class MoCoConfig(TwoViewsConfig):
    """MoCo v3's hyperparameters; the defaults are the paper's for ResNet-50 (section 3 and appendix)."""

    name: Literal["moco"] = "moco"
    views: list[ViewConfig] = Field(default_factory=byol_views, min_length=1)
    """Two views, which differ in blur and solarisation (section 3; the paper takes BYOL's)."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the softmax over similarities: 1.0 for ResNet-50, 0.2 for ViT."""
    momentum: float = Field(default=0.99, ge=0, le=1)
    """Of the teacher at the start; rises to 1 by a cosine (0.996 for 300 epochs and more)."""
    hidden_width: int = Field(default=4096, ge=1)
    """Of the heads' hidden layers."""
    projection_width: int = Field(default=256, ge=1)
    """Of queries and keys."""
    projection_layers: int = Field(default=2, ge=2)
    """Linear layers of the projection head: 2 for ResNet-50, 3 for ViT."""
    queue: int = Field(default=0, ge=0)
    """Past keys that serve as further negatives (MoCo v1, v2); 0 for none, as in v3."""
    frozen_patches: bool = False
    """Keep a ViT's patch projection at its random start (section 4.2, for stability)."""


class MoCo(TwoViews):
    """Queries of the student find keys of a momentum teacher."""

    queue: Tensor

    def __init__(self, config: MoCoConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        super().__init__(config, vision, encoder)
        self.config = config
        if config.frozen_patches:
            vit = require_vit(self.encoder, "moco with frozen_patches", vision.model)
            vit.patch_embed.requires_grad_(False)
        hidden, width = config.hidden_width, config.projection_width
        self.projector = plain_last_norm(
            MoCoProjectionHead(self.width, hidden, width, config.projection_layers, batch_norm=True)
        )
        self.predictor = plain_last_norm(MoCoProjectionHead(width, hidden, width, 2, batch_norm=True))
        self.teacher = Teacher(encoder=self.encoder, projector=self.projector)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue, width), dim=1))

    def observe(self, views: Tensors, progress: float) -> Tensors:
        """The teacher's `keys`, before its projection: (b, 2, d)."""
        with torch.no_grad():
            encoder: Any = self.teacher.encoder
            return {"keys": torch.stack([encoder(view) for view in views["views"]], dim=1)}

    def compare(self, embeddings: Tensors, progress: float) -> Output:
        """Cross-entropy of each view's query against the other view's keys, times twice the temperature
        (algorithm 1). Targets are samples. Metric: `accuracy` of finding the key."""
        losses, right, fresh = [], [], []
        projector: Any = self.teacher.projector
        for query_view, key_view in ((0, 1), (1, 0)):
            query = F.normalize(self.predictor(self.projector(embeddings["features"][:, query_view])).float(), dim=1)
            with torch.no_grad():
                key = self.everyone(F.normalize(projector(embeddings["keys"][:, key_view]).float(), dim=1))
            fresh.append(key)
            with torch.autocast(query.device.type, enabled=False):
                logits = query @ torch.cat([key, self.queue]).T / self.config.temperature
            label = torch.arange(len(query), device=query.device) + self.place(query)
            losses.append(F.cross_entropy(logits, label, reduction="sum"))
            right.append((logits.argmax(1) == label).sum().float())
        loss = 2.0 * self.config.temperature * (losses[0] + losses[1])
        count = loss.new_tensor(float(len(embeddings["keys"])))
        output = Output(loss, count, {"accuracy": (right[0] + right[1]) / 2})
        if self.config.queue:
            # All processes hold all keys; their sum is to be one set of them.
            processes = len(fresh[0]) // len(embeddings["keys"])
            output.statistics["keys"] = torch.cat(fresh) / processes
        return output

    def after_step(self, progress: float, statistics: Tensors) -> None:
        """The teacher follows; the newest keys push the oldest out of the queue."""
        momentum = cosine(progress, self.config.momentum, 1.0)
        self.teacher.follow(momentum, encoder=self.encoder, projector=self.projector)
        if self.config.queue:
            self.queue.copy_(torch.cat([statistics["keys"], self.queue])[: self.config.queue])


def plain_last_norm(head: Any) -> Any:
    """lightly's MoCo head with a last BatchNorm that has no weight and bias, as in the paper's code."""
    last = head.layers[-1]
    head.layers[-1] = nn.BatchNorm1d(last.num_features, affine=False)
    return head
