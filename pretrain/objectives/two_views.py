"""What the methods with two augmented views of each picture share: the views, the encoder's part, the widths."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from einops import rearrange
from pydantic import model_validator
from torch import Tensor, nn

from data.batch import ImageBatch
from pretrain.encoders.vision import VisionConfig, build_vision
from pretrain.objectives.protocol import JointObjective, Output, Tensors
from pretrain.views import BlurConfig, JitterConfig, ViewConfig, ViewsConfig, make_views


class TwoViewsConfig(ViewsConfig):
    """Two views of one size; SimCLR's augmentation by default (`views`)."""

    encoder_kind: ClassVar = "vision"

    @model_validator(mode="after")
    def _two(self) -> Self:
        if self.count != 2 or len({view.size for view in self.views}) != 1:
            raise ValueError(f"needs exactly two views of one size, not {self.count}")
        return self


def byol_views() -> list[ViewConfig]:
    """BYOL's two views (Grill et al. 2020, table 6): one always blurred, the other seldom, but at times solarised."""
    jitter = JitterConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return [
        ViewConfig(jitter=jitter, blur=BlurConfig(probability=1.0)),
        ViewConfig(jitter=jitter, blur=BlurConfig(probability=0.1), solarize=0.2),
    ]


class TwoViews(JointObjective):
    """An encoder that sees two views; subclasses bring heads and say how to compare."""

    one_pass: ClassVar = False
    """Whether BatchNorm in the encoder normalises both views together, as one batch of twice the size."""

    def __init__(self, config: TwoViewsConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.vision, self.views = vision, config
        self.encoder = build_vision(vision) if encoder is None else encoder
        self.width = feature_width(self.encoder)

    def view(self, batch: ImageBatch) -> Tensors:
        """`views`: float32 (2, b, 3, s, s)."""
        return {"views": make_views(batch, self.views, self.vision)[0]}

    def embed(self, views: Tensors, progress: float) -> Tensors:
        """`features` (b, 2, d)."""
        return {"features": both(self.encoder, views["views"], self.one_pass)}


def both(encoder: nn.Module, views: Tensor, one_pass: bool = False) -> Tensor:
    """Features (b, v, d) of views (v, b, 3, s, s), all in one batch or view by view."""
    if one_pass:
        count = len(views)
        return rearrange(encoder(rearrange(views, "v b c h w -> (v b) c h w")), "(v b) d -> b v d", v=count)
    return torch.stack([encoder(view) for view in views], dim=1)


def feature_width(encoder: nn.Module) -> int:
    """Width of a timm encoder's pooled features."""
    return int(encoder.num_features)  # type: ignore[arg-type]


def mean_output(loss: Tensor, samples: int, metrics: Tensors | None = None) -> Output:
    """A loss that is a mean over the global batch, the same on every process, as this process's share of a sum."""
    found = {name: value.detach().float() * samples for name, value in (metrics or {}).items()}
    return Output(loss * samples, loss.new_tensor(float(samples)), found)
