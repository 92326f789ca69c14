"""Supervised pre-training, the classic baseline: cross-entropy on labels, with mixup, CutMix and label smoothing."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from data.batch import ImageBatch, TextBatch
from data.errors import UserError
from pretrain.encoders.vision import VisionConfig, build_vision
from pretrain.objectives.one_view import OneViewConfig, one_view, plain_view
from pretrain.objectives.protocol import Objective, Output, Tensors
from pretrain.objectives.two_views import feature_width
from pretrain.views import ViewConfig
from pretrain.views.mixing import MixConfig, mix, mixed_targets


class SupervisedConfig(OneViewConfig):
    """Settings of supervised pre-training; the defaults are those of He et al. 2016 but for the smoothing."""

    name: Literal["supervised"] = "supervised"
    views: list[ViewConfig] = Field(default_factory=lambda: plain_view((0.08, 1.0)), min_length=1)
    """One view: a random crop and flip."""
    classes: int | None = Field(default=None, ge=2)
    """Classes of the data; what the shards say without it."""
    smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the target spread over all classes (Szegedy et al. 2016, section 7)."""
    mix: MixConfig | None = None
    """Mixup and CutMix of neighbours in the batch; null for neither."""


class Supervised(Objective):
    """An encoder and a linear classifier. Samples without a label (-1), or mixed with one, do not count."""

    def __init__(self, config: SupervisedConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        """Around `encoder`, or a new one; raises `UserError` where the number of classes is open."""
        super().__init__()
        self.config, self.vision = config, vision
        self.encoder = build_vision(vision) if encoder is None else encoder
        if config.classes is None:
            raise UserError("objective.classes is open and no labelled shards tell it; set it")
        self.classifier = nn.Linear(feature_width(self.encoder), config.classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def view(self, batch: ImageBatch) -> Tensors:
        """`images` float32 (b, 3, s, s), `targets` (b, classes), and `share` (b,) of each one's own label."""
        assert self.config.classes is not None
        images = one_view(batch, self.config, self.vision, self.training)
        share = torch.ones(len(images), device=images.device)
        partner = torch.arange(len(images), device=images.device)
        if self.training and self.config.mix is not None:
            images, partner, share = mix(images, batch.keys, self.config.mix)
        known = (batch.labels >= 0) & (batch.labels[partner] >= 0)
        smoothing = self.config.smoothing if self.training else 0.0
        targets = mixed_targets(batch.labels.clamp(min=0), partner, share, self.config.classes, smoothing)
        return {"images": images, "targets": targets * known[:, None], "share": share}

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """Cross-entropy with soft targets; targets are labelled samples. Metric: `accuracy`, against each sample's
        own label even where another is mixed in."""
        assert isinstance(batch, ImageBatch)
        views = self.view(batch)
        logits = self.classifier(self.encoder(views["images"])).float()
        known = views["targets"].sum(dim=1) > 0
        loss = -(views["targets"] * F.log_softmax(logits, dim=1)).sum()
        right = ((logits.argmax(dim=1) == batch.labels) & known).sum()
        return Output(loss, known.sum().float(), {"accuracy": right.float()})


def resolve_classes(config: SupervisedConfig, classes: int, largest: int, source: str) -> SupervisedConfig:
    """The settings with the number of classes that the data have, where it was left open.

    Args:
        classes: named in the shards; `largest` label among the samples, -1 where none is labelled.

    Raises:
        UserError: the data have no labels, or more classes than `config` says.
    """
    found = max(classes, largest + 1)
    if largest < 0:
        raise UserError(f"objective supervised needs labels, but {source} has none; shard a folder of class folders")
    if config.classes is not None and config.classes <= largest:
        raise UserError(f"{source} has labels up to {largest}, but objective.classes is {config.classes}")
    return config if config.classes is not None else config.model_copy(update={"classes": max(found, 2)})
