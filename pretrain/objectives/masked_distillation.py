"""Self-distillation of masked patches: iBOT (Zhou et al., ICLR 2022) and DINOv2 (Oquab et al. 2023).

The student sees global views with blocks of patches masked; besides sorting the views as in DINO, it sorts each
masked patch as the teacher, who sees it, does.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data.batch import ImageBatch
from pretrain.encoders.tokens import masked_tokens, require_vit
from pretrain.encoders.vision import VisionConfig, build_vision
from pretrain.objectives.protocol import Output, Tensors
from pretrain.objectives.prototypes import cross_entropy
from pretrain.objectives.self_distillation import DINO, DINOConfig
from pretrain.objectives.teacher import Teacher
from pretrain.objectives.two_views import both
from pretrain.schedules import cosine
from pretrain.views.masks import BlockwiseMask, blockwise


class IBOTConfig(DINOConfig):
    """iBOT's hyperparameters; the defaults are the paper's for ViT-S (section 4.1, appendix B)."""

    name: Literal["ibot"] = "ibot"  # type: ignore[assignment]
    prototypes: int = Field(default=8192, ge=2)
    """Outputs of the head (K)."""
    patch_weight: float = Field(default=1.0, ge=0)
    """Of the masked patches' loss."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Share of masked patches, drawn uniformly."""
    mask_probability: float = Field(default=0.5, ge=0, le=1)
    """Share of global views that are masked at all."""
    shared_head: bool = True
    """One head for views and patches (section 4.3.1), or one each (DINOv2)."""


class DINOv2Config(IBOTConfig):
    """DINOv2's choices (section 4 and table 16), for training from scratch."""

    name: Literal["dinov2"] = "dinov2"  # type: ignore[assignment]
    prototypes: int = Field(default=65536, ge=2)
    """Outputs of each head (K)."""
    centering: Literal["center", "sinkhorn"] = "sinkhorn"
    """Sinkhorn-Knopp, three iterations."""
    koleo_weight: float = Field(default=0.1, ge=0)
    """Of the regulariser that spreads the global views' features."""
    shared_head: bool = False
    """One head each."""


class IBOT(DINO):
    """DINO with masked patches, over a ViT."""

    config: IBOTConfig
    mask_token: nn.Parameter
    patch_center: Tensor

    def __init__(self, config: IBOTConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        """Around `encoder`, or a new one; raises `UserError` where it is no ViT."""
        vit = require_vit(build_vision(vision) if encoder is None else encoder, config.name, vision.model)
        super().__init__(config, vision, vit)
        self.patch_weight = config.patch_weight
        self.masking = BlockwiseMask(ratio=config.mask_ratio, probability=config.mask_probability)
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim))
        self.register_buffer("patch_center", torch.zeros(config.prototypes))
        if not config.shared_head:
            self.patch_head = self.new_head()
            self.teacher = Teacher(encoder=vit, head=self.head, patch_head=self.patch_head)

    def view(self, batch: ImageBatch) -> Tensors:
        """DINO's views, and `masks` of the global ones: bool (b, global, patches)."""
        found = super().view(batch)
        grid = _vit(self.encoder).patch_embed.grid_size
        masks = [blockwise(batch.keys, grid, self.masking, f"mask.{n}") for n in range(len(found["view0"]))]
        return found | {"masks": torch.stack(masks, dim=1)}

    def embed(self, views: Tensors, progress: float) -> Tensors:
        """DINO's `features`, and the student's `patches` (b, global, patches, d), some of them seen masked."""
        features, patches = _look(_vit(self.encoder), views["view0"], views["masks"], self.mask_token)
        local = [both(self.encoder, views[f"view{n}"], one_pass=True) for n in range(1, len(views) - 1)]
        return {"features": torch.cat([features, *local], dim=1), "patches": patches}

    def observe(self, views: Tensors, progress: float) -> Tensors:
        """The teacher's `targets` (b, global, d) and `patch_targets` (b, global, patches, d); the `masks`."""
        with torch.no_grad():
            teacher = _vit(self.teacher.get_submodule("encoder"))
            targets, patches = _look(teacher, views["view0"], None, self.mask_token)
        return {"targets": targets, "patch_targets": patches, "masks": views["masks"]}

    def compare(self, embeddings: Tensors, progress: float) -> Output:
        """DINO's loss, and the cross-entropy of masked patches (iBOT, equation 2): a mean over the masked patches of
        each view, then over views. Metric besides DINO's: `patch_loss`."""
        output = super().compare(embeddings, progress)
        masks = embeddings["masks"]
        # Where masks are true, found once: on a GPU each look for it waits for the device.
        hidden = masks.flatten().nonzero().squeeze(1)
        head: Any = self.head if self.config.shared_head else self.patch_head
        teacher: Any = self.teacher.head if self.config.shared_head else self.teacher.patch_head
        with torch.no_grad():
            targets = teacher(embeddings["patch_targets"].flatten(0, 2)[hidden])
            assigned = self.assign(targets, self.patch_center, progress)
        logits = head(embeddings["patches"].flatten(0, 2)[hidden], progress < self.config.frozen_prototypes)
        weight = (1.0 / masks.sum(dim=2, keepdim=True).clamp(min=1)).expand(masks.shape).flatten()
        errors = cross_entropy(assigned, logits, self.config.student_temperature)
        loss = (errors * weight[hidden]).sum() / masks.shape[1]
        output.loss_sum = output.loss_sum + self.patch_weight * loss
        output.metrics["patch_loss"] = loss.detach()
        output.statistics |= {"patch_center": targets.float().sum(dim=0), "patches": masks.sum().float()}
        return output

    def after_step(self, progress: float, statistics: Tensors) -> None:
        """As DINO's; the patches have a centre of their own, which stays where no patch was masked."""
        super().after_step(progress, statistics)
        if not self.config.shared_head:
            momentum = cosine(progress, self.config.momentum, 1.0)
            self.teacher.follow(momentum, patch_head=self.patch_head)
        count = statistics["patches"]
        share = (1.0 - self.config.center_momentum) * (count > 0)
        self.patch_center.add_(share * (statistics["patch_center"] / count.clamp(min=1.0) - self.patch_center))


def _vit(encoder: nn.Module) -> VisionTransformer:
    assert isinstance(encoder, VisionTransformer)
    return encoder


def _look(vit: VisionTransformer, views: Tensor, masks: Tensor | None, token: Tensor) -> tuple[Tensor, Tensor]:
    """Features (b, v, d) and patches (b, v, n, d) of views (v, b, 3, s, s) with masks (b, v, n)."""
    images = rearrange(views, "v b c h w -> (v b) c h w")
    hidden = None if masks is None else rearrange(masks, "b v n -> (v b) n")
    tokens = masked_tokens(vit, images, hidden, token)
    features = rearrange(vit.forward_head(tokens, pre_logits=True), "(v b) d -> b v d", v=len(views))
    return features, rearrange(tokens[:, vit.num_prefix_tokens :], "(v b) n d -> b v n d", v=len(views))
