"""Prediction in latent space: I-JEPA (Assran et al., "Self-supervised learning from images with a joint-embedding
predictive architecture", CVPR 2023).

A ViT encodes a few context patches; a narrow ViT predicts, for several blocks elsewhere, what a teacher that sees
the whole picture makes of them.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, Self

import torch
from einops import rearrange, repeat
from pydantic import Field, model_validator
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from data.batch import ImageBatch, TextBatch
from pretrain.encoders.tokens import masked_tokens, require_vit
from pretrain.encoders.vision import VisionConfig, build_vision, sincos_positions
from pretrain.objectives.one_view import OneViewConfig, one_view, plain_view
from pretrain.objectives.protocol import Objective, Output, Tensors
from pretrain.objectives.teacher import Teacher
from pretrain.schedules import linear
from pretrain.views import ViewConfig
from pretrain.views.masks import MultiBlockMask, multi_block


class IJEPAConfig(OneViewConfig):
    """I-JEPA's hyperparameters; the defaults are the paper's for ViT-B (section 3, appendix A.1)."""

    name: Literal["ijepa"] = "ijepa"
    views: list[ViewConfig] = Field(default_factory=lambda: plain_view((0.3, 1.0), flip=0.0), min_length=1)
    """One view: a random crop, and no other change."""
    targets: int = Field(default=4, ge=1)
    """Target blocks of a picture."""
    target_share: float = Field(default=0.175, gt=0, lt=1)
    """Patches of a target block as a share of all (the paper draws from [0.15, 0.2])."""
    target_aspect: tuple[float, float] = (0.75, 1.5)
    """Its height over its width."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Area of the context block, before the targets are cut out."""
    context_share: float = Field(default=0.3, gt=0, lt=1)
    """Patches that the context keeps, as a share of all."""
    predictor_width: int = Field(default=384, ge=4)
    """Width of the predictor."""
    predictor_depth: int = Field(default=6, ge=1)
    """Blocks of the predictor (12 for ViT-L and larger)."""
    predictor_heads: int = Field(default=12, ge=1)
    """Attention heads of the predictor; they divide its width."""
    momentum: float = Field(default=0.996, ge=0, le=1)
    """Of the teacher at the start; rises to 1 linearly. A short run needs a faster teacher, whose memory of
    1 / (1 - momentum) steps is a small part of the run: 0.9 for some hundred steps."""
    export: Literal["student", "teacher"] = "teacher"
    """Which encoder is evaluated and exported (section 4: the target encoder)."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.predictor_width % self.predictor_heads or self.predictor_width % 4:
            raise ValueError(f"predictor_width {self.predictor_width} must be a multiple of predictor_heads and of 4")
        return self


class IJEPA(Objective):
    """A context encoder, its teacher, and a predictor between them."""

    encoder: VisionTransformer
    positions: Tensor

    def __init__(self, config: IJEPAConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        """Around `encoder`, or a new one; raises `UserError` where it is no ViT, or too few patches are there."""
        super().__init__()
        self.config, self.vision = config, vision
        self.encoder = require_vit(build_vision(vision) if encoder is None else encoder, "ijepa", vision.model)
        rows, columns = self.encoder.patch_embed.grid_size
        self.grid = (rows, columns)
        self.masks = MultiBlockMask(
            config.targets, config.target_share, config.target_aspect, config.context_scale, config.context_share
        )
        multi_block(torch.zeros(1, dtype=torch.int64), self.grid, self.masks)  # says now what would not fit
        width = config.predictor_width
        self.predictor_embed = nn.Linear(self.encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos_positions(width, rows, columns))
        norm = partial(nn.LayerNorm, eps=1e-6)
        blocks = [
            Block(width, config.predictor_heads, qkv_bias=True, norm_layer=norm) for _ in range(config.predictor_depth)
        ]
        self.predictor = nn.Sequential(*blocks, norm(width), nn.Linear(width, self.encoder.embed_dim))
        self._initialise()
        self.teacher = Teacher(encoder=self.encoder)

    def view(self, batch: ImageBatch) -> Tensors:
        """`images` float32 (b, 3, s, s); patch numbers `context` int64 (b, c) and `targets` (b, blocks, t)."""
        context, targets = multi_block(batch.keys, self.grid, self.masks)
        images = one_view(batch, self.config, self.vision, self.training)
        return {"images": images, "context": context, "targets": targets}

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """Smooth absolute error of the predicted targets, a mean over features; targets are patches of blocks.

        The paper's section 3 squares; its code, as we do, takes the smooth L1 loss of layer-normalised targets.
        """
        assert isinstance(batch, ImageBatch)
        views = self.view(batch)
        predicted = self.predict(self.encode(views["images"], views["context"]), views["context"], views["targets"])
        wanted = self.latents(views["images"], views["targets"])
        error = F.smooth_l1_loss(predicted.float(), wanted, reduction="none").mean(dim=-1)
        return Output(error.sum(), error.new_tensor(float(error.numel())))

    def encode(self, images: Tensor, context: Tensor) -> Tensor:
        """Prefix tokens and context patches, which see nothing but each other: (b, prefix + c, d)."""
        encoder, prefix = self.encoder, self.encoder.num_prefix_tokens
        tokens = encoder._pos_embed(encoder.patch_embed(images))
        kept = repeat(context + prefix, "b n -> b n d", d=tokens.shape[-1])
        tokens = torch.cat([tokens[:, :prefix], tokens.gather(1, kept)], dim=1)
        return encoder.norm(encoder.blocks(encoder.norm_pre(tokens)))

    def predict(self, encoded: Tensor, context: Tensor, targets: Tensor) -> Tensor:
        """Latents of the target patches, block by block: (b, blocks, t, d)."""
        tokens = self.predictor_embed(encoded)
        prefix = tokens.shape[1] - context.shape[1]
        positions = self.positions.to(tokens.dtype)
        tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:] + positions[context]], dim=1)
        masks = rearrange(self.mask_token.to(tokens.dtype) + positions[targets], "b m t d -> (b m) t d")
        tokens = torch.cat([repeat(tokens, "b n d -> (b m) n d", m=targets.shape[1]), masks], dim=1)
        predicted = self.predictor(tokens)[:, -targets.shape[2] :]
        return rearrange(predicted, "(b m) t d -> b m t d", m=targets.shape[1])

    @torch.no_grad()
    def latents(self, images: Tensor, targets: Tensor) -> Tensor:
        """The teacher's view of the target patches, layer-normalised: float32 (b, blocks, t, d)."""
        teacher = self.teacher.get_submodule("encoder")
        assert isinstance(teacher, VisionTransformer)
        tokens = masked_tokens(teacher, images, None, self.mask_token)[:, teacher.num_prefix_tokens :].float()
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        places = repeat(targets, "b m t -> b (m t) d", d=tokens.shape[-1])
        return rearrange(tokens.gather(1, places), "b (m t) d -> b m t d", m=targets.shape[1])

    def after_step(self, progress: float, statistics: Tensors) -> None:
        """The teacher follows."""
        self.teacher.follow(linear(progress, self.config.momentum, 1.0), encoder=self.encoder)

    def exported(self) -> nn.Module:
        return self.encoder if self.config.export == "student" else self.teacher.get_submodule("encoder")

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for module in (*self.predictor.modules(), self.predictor_embed):
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for depth, block in enumerate(self.predictor[:-2], start=1):  # as the paper's code does (and BEiT's)
            with torch.no_grad():
                block.attn.proj.weight.div_((2.0 * depth) ** 0.5)  # type: ignore[union-attr,operator]
                block.mlp.fc2.weight.div_((2.0 * depth) ** 0.5)  # type: ignore[union-attr,operator]
