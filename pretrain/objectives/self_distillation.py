"""Self-distillation: a student sorts every view into prototypes as its teacher sorts the large ones.

DINO (Caron et al., "Emerging properties in self-supervised vision transformers", ICCV 2021), iBOT (Zhou et al., ICLR
2022), which asks the same of masked patches, and DINOv2's choices over iBOT (Oquab et al. 2023, section 4).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from data.batch import ImageBatch
from pretrain.encoders.tokens import require_sizes
from pretrain.encoders.vision import VisionConfig, build_vision
from pretrain.objectives.protocol import JointObjective, Output, Tensors
from pretrain.objectives.prototypes import PrototypeHead, centred, koleo, sinkhorn
from pretrain.objectives.teacher import Teacher
from pretrain.objectives.two_views import both, feature_width
from pretrain.schedules import cosine, linear
from pretrain.views import BlurConfig, JitterConfig, ViewConfig, ViewsConfig, make_views


def multi_crop() -> list[ViewConfig]:
    """DINO's two global and eight local crops (section 3.1, appendix); the globals differ as BYOL's views do."""
    jitter = JitterConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    whole = (0.4, 1.0)
    return [
        ViewConfig(scale=whole, jitter=jitter, blur=BlurConfig(probability=1.0)),
        ViewConfig(scale=whole, jitter=jitter, blur=BlurConfig(probability=0.1), solarize=0.2),
        ViewConfig(count=8, size=96, scale=(0.05, 0.4), jitter=jitter, blur=BlurConfig(probability=0.5)),
    ]


class DINOConfig(ViewsConfig):
    """DINO's hyperparameters; the defaults are the paper's for ViT-S (section 3, appendix)."""

    encoder_kind: ClassVar = "vision"
    name: Literal["dino"] = "dino"
    views: list[ViewConfig] = Field(default_factory=multi_crop, min_length=1)
    """Global views, the teacher's, come first; views of another size than theirs are local."""
    prototypes: int = Field(default=65536, ge=2)
    """Outputs of the head (K)."""
    hidden_width: int = Field(default=2048, ge=1)
    """Of the head's two hidden layers."""
    bottleneck_width: int = Field(default=256, ge=1)
    """Where the head's features are brought to length one."""
    student_temperature: float = Field(default=0.1, gt=0)
    """Of the student's softmax."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """Of the teacher's: at the start, and after `temperature_warmup`."""
    temperature_warmup: float = Field(default=0.1, ge=0, le=1)
    """Share of training over which the teacher's temperature rises linearly (30 of 300 epochs)."""
    momentum: float = Field(default=0.996, ge=0, le=1)
    """Of the teacher at the start; rises to 1 by a cosine."""
    centering: Literal["center", "sinkhorn"] = "center"
    """What keeps the teacher off a few prototypes: a running mean (DINO), or Sinkhorn-Knopp (DINOv2)."""
    center_momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of the running mean."""
    frozen_prototypes: float = Field(default=0.01, ge=0, le=1)
    """Share of training during which the prototypes stay (one epoch)."""
    koleo_weight: float = Field(default=0.0, ge=0)
    """Of the regulariser that spreads the global views' features (DINOv2: 0.1)."""
    export: Literal["student", "teacher"] = "teacher"
    """Which encoder is evaluated and exported (section 5.1: the teacher)."""

    @model_validator(mode="after")
    def _has_pairs(self) -> Self:
        if self.count < 2 or min(self.teacher_temperature) <= 0:
            raise ValueError("needs at least two views and teacher temperatures above zero")
        return self

    @property
    def global_views(self) -> int:
        """Views of the first kind's size."""
        return sum(view.count for view in self.views if view.size == self.views[0].size)


class DINO(JointObjective):
    """A student and its teacher, each an encoder and a `PrototypeHead`."""

    center: Tensor

    def __init__(self, config: DINOConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        """Around `encoder`, or a new one; raises `UserError` where it does not take the views' sizes."""
        super().__init__()
        self.config, self.vision = config, vision
        # A running mean asks nothing of the other samples; the plain path then costs one forward pass, not two.
        self.joint = config.centering == "sinkhorn" or config.koleo_weight > 0
        self.encoder = build_vision(vision) if encoder is None else encoder
        sizes = {view.size or vision.image_size for view in config.views}
        require_sizes(self.encoder, sizes, vision.image_size, vision.model)
        self.head = self.new_head()
        self.teacher = Teacher(encoder=self.encoder, head=self.head)
        self.register_buffer("center", torch.zeros(config.prototypes))

    def new_head(self) -> PrototypeHead:
        """A head of the configured widths."""
        config = self.config
        widths = (config.hidden_width, config.bottleneck_width, config.prototypes)
        return PrototypeHead(feature_width(self.encoder), *widths)

    def view(self, batch: ImageBatch) -> Tensors:
        """`view0` (views, b, 3, s, s), the global ones; `view1`, …: local ones, by size."""
        groups = make_views(batch, self.config, self.vision)
        return {f"view{number}": group for number, group in enumerate(groups)}

    def embed(self, views: Tensors, progress: float) -> Tensors:
        """`features` (b, all views, d), the global ones first."""
        return {"features": torch.cat([both(self.encoder, group, one_pass=True) for group in views.values()], dim=1)}

    def observe(self, views: Tensors, progress: float) -> Tensors:
        """The teacher's `targets`: features of the global views (b, global, d)."""
        encoder: Any = self.teacher.encoder
        with torch.no_grad():
            return {"targets": both(encoder, views["view0"], one_pass=True)}

    def compare(self, embeddings: Tensors, progress: float) -> Output:
        """Cross-entropy between all pairs of a teacher's and another view (equation 3), a mean over pairs;
        targets are samples. Metrics: `agreement` of student and teacher on the prototype of a view; `koleo`."""
        frozen = progress < self.config.frozen_prototypes
        teacher: Any = self.teacher
        with torch.no_grad():
            targets = teacher.head(embeddings["targets"])
            assigned = self.assign(targets, self.center, progress)
        logits = self.head(embeddings["features"], frozen)
        globals_ = targets.shape[1]
        # Each teacher's view meets every student's view but itself.
        scores = F.log_softmax(logits.float() / self.config.student_temperature, dim=-1)
        others = scores.sum(dim=1, keepdim=True) - scores[:, :globals_]
        pairs = globals_ * (logits.shape[1] - 1)
        loss = -(assigned * others).sum() / pairs
        count = loss.new_tensor(float(len(targets)))
        agreement = (logits[:, :globals_].argmax(-1) == assigned.argmax(-1)).float().mean(dim=1).sum()
        output = Output(loss, count, {"agreement": agreement})
        output.statistics = {"center": targets.float().sum(dim=(0, 1)), "views": count * globals_}
        if self.config.koleo_weight:
            spread = torch.stack([self.spread(view) for view in embeddings["features"][:, :globals_].unbind(1)]).mean()
            output.loss_sum = output.loss_sum + self.config.koleo_weight * spread
            output.metrics["koleo"] = spread.detach()
        return output

    def assign(self, logits: Tensor, center: Tensor, progress: float) -> Tensor:
        """The teacher's assignments (…, prototypes) of its logits."""
        start, end = self.config.teacher_temperature
        temperature = linear(progress, start, end, self.config.temperature_warmup)
        if self.config.centering == "center":
            return centred(logits, center, temperature)
        if logits.ndim == 2:
            return sinkhorn(logits, temperature, self.total)
        # View by view, as the paper's code does.
        return torch.stack([sinkhorn(view, temperature, self.total) for view in logits.unbind(1)], dim=1)

    def spread(self, features: Tensor) -> Tensor:
        """KoLeo of one view's features (b, d), summed over samples."""
        unit = F.normalize(features.float(), dim=1)
        return koleo(unit, self.everyone(unit), self.place(unit))

    def after_step(self, progress: float, statistics: Tensors) -> None:
        """The teacher follows; the centre moves (equation 4)."""
        self.teacher.follow(cosine(progress, self.config.momentum, 1.0), encoder=self.encoder, head=self.head)
        self.center.lerp_(statistics["center"] / statistics["views"], 1.0 - self.config.center_momentum)

    def exported(self) -> nn.Module:
        return self.encoder if self.config.export == "student" else self.teacher.get_submodule("encoder")
