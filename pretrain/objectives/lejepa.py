"""LeJEPA (Balestriero and LeCun, "LeJEPA: provable and scalable self-supervised learning without the heuristics",
2025): views meet at the mean of the global ones, and embeddings are held to an isotropic Gaussian (SIGReg).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from einops import rearrange
from lightly.models.modules.heads import LeJEPAProjectionHead
from pydantic import Field
from torch import Tensor, nn

from data.batch import ImageBatch
from data.keyed import uniform
from pretrain.encoders.tokens import require_sizes
from pretrain.encoders.vision import VisionConfig, build_vision
from pretrain.objectives.protocol import JointObjective, Output, Tensors
from pretrain.objectives.two_views import both, feature_width, mean_output
from pretrain.views import BlurConfig, JitterConfig, ViewConfig, ViewsConfig, make_views


def lejepa_views() -> list[ViewConfig]:
    """Two global and six local views, all augmented alike."""
    jitter = JitterConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return [
        ViewConfig(count=2, scale=(0.3, 1.0), jitter=jitter, blur=BlurConfig(), solarize=0.2),
        ViewConfig(count=6, size=96, scale=(0.05, 0.3), jitter=jitter, blur=BlurConfig(), solarize=0.2),
    ]


class LeJEPAConfig(ViewsConfig):
    """LeJEPA's hyperparameters; the defaults are the paper's and its code's."""

    encoder_kind: ClassVar = "vision"
    name: Literal["lejepa"] = "lejepa"
    views: list[ViewConfig] = Field(default_factory=lejepa_views, min_length=1)
    """Global views come first; views of another size than theirs are local."""
    weight: float = Field(default=0.05, ge=0, le=1)
    """Of SIGReg; the invariance has the rest (lambda, section 5)."""
    hidden_width: int = Field(default=2048, ge=1)
    """Of the projection head's hidden layers."""
    projection_width: int = Field(default=64, ge=1)
    """Of the projections."""
    projection_layers: int = Field(default=3, ge=2)
    """Linear layers of the projection head."""
    slices: int = Field(default=1024, ge=1)
    """Random directions a step, along which the embeddings are compared with a Gaussian."""
    knots: int = Field(default=17, ge=2)
    """Frequencies of the characteristic function."""
    largest_frequency: float = Field(default=3.0, gt=0)
    """Of these, from 0."""


class LeJEPA(JointObjective):
    """An encoder and a projection head: no teacher, no stop of gradients."""

    def __init__(self, config: LeJEPAConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        """Around `encoder`, or a new one; raises `UserError` where it does not take the views' sizes."""
        super().__init__()
        self.config, self.vision = config, vision
        self.encoder = build_vision(vision) if encoder is None else encoder
        sizes = {view.size or vision.image_size for view in config.views}
        require_sizes(self.encoder, sizes, vision.image_size, vision.model)
        self.globals = sum(view.count for view in config.views if view.size == config.views[0].size)
        widths = (config.hidden_width, config.projection_width, config.projection_layers)
        self.projector = LeJEPAProjectionHead(feature_width(self.encoder), *widths)

    def view(self, batch: ImageBatch) -> Tensors:
        """`view0` (views, b, 3, s, s), `view1`, …: by size; the samples' `keys` int64 (b,)."""
        groups = make_views(batch, self.config, self.vision)
        return {f"view{number}": group for number, group in enumerate(groups)} | {"keys": batch.keys}

    def embed(self, views: Tensors, progress: float) -> Tensors:
        """`features` (b, all views, d), the global ones first."""
        groups = [group for name, group in views.items() if name != "keys"]
        return {"features": torch.cat([both(self.encoder, group, one_pass=True) for group in groups], dim=1)}

    def observe(self, views: Tensors, progress: float) -> Tensors:
        """The samples' `keys`."""
        return {"keys": views["keys"]}

    def compare(self, embeddings: Tensors, progress: float) -> Output:
        """Both terms over the global batch; targets are samples. Metrics: the terms, unweighted."""
        samples, views = embeddings["features"].shape[:2]
        projected = self.projector(rearrange(embeddings["features"], "b v d -> (b v) d")).float()
        projected = rearrange(projected, "(b v) d -> v b d", v=views)
        with torch.autocast(projected.device.type, enabled=False):
            count = self.total(projected.new_tensor([float(samples)]))[0]
            centre = projected[: self.globals].mean(dim=0)
            apart = self.total((projected - centre).square().mean(dim=(0, 2)).sum()[None])[0] / count
            directions = self.directions(embeddings["keys"], projected.shape[-1])
            gaussian = self.sigreg(projected, directions, count)
            loss = self.config.weight * gaussian + (1.0 - self.config.weight) * apart
        return mean_output(loss, samples, {"sigreg": gaussian, "invariance": apart})

    def directions(self, keys: Tensor, width: int) -> Tensor:
        """Random unit vectors (width, slices): a function of the global batch's samples, so that all processes
        and all ways of splitting the batch draw the same."""
        drawn = uniform(self.total(keys.sum()[None]), "sigreg", (width, self.config.slices))[0]
        normal = torch.erfinv((2.0 * drawn - 1.0).clamp(-1 + 1e-6, 1 - 1e-6))
        return normal / normal.norm(dim=0)

    def sigreg(self, projected: Tensor, directions: Tensor, count: Tensor) -> Tensor:
        """Epps and Pulley's statistic against a standard Gaussian, a mean over directions and views (section 4).

        Args:
            projected: float32 (v, b, d); `directions` (d, slices); `count` of the global batch's samples.
        """
        knots, largest = self.config.knots, self.config.largest_frequency
        frequencies = torch.linspace(0.0, largest, knots, device=projected.device)
        gaussian = torch.exp(-frequencies.square() / 2.0)
        # The integrand is even: twice the trapezoidal rule over its positive half.
        step = torch.full_like(frequencies, 2.0 * largest / (knots - 1))
        step[[0, -1]] /= 2.0
        phases = (projected @ directions)[..., None] * frequencies
        waves = self.total(torch.stack([phases.cos().sum(dim=1), phases.sin().sum(dim=1)])) / count
        error = (waves[0] - gaussian).square() + waves[1].square()
        return (error @ (step * gaussian)).mean() * count
