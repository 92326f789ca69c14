"""Masked image modelling: MAE (He et al., "Masked autoencoders are scalable vision learners", CVPR 2022).

Most patches are hidden; a ViT encodes the visible ones alone; a narrow decoder gets these, mask tokens
in the place of the others, and predicts the hidden patches' pixels, normalised patch by patch.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

import torch
from einops import rearrange, repeat
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from data.batch import ImageBatch, TextBatch
from data.errors import UserError
from data.keyed import permutation
from pretrain.encoders.vision import VisionConfig, build_vision, eval_view, sincos_positions
from pretrain.objectives.last_block import LastBlock
from pretrain.objectives.protocol import Objective, Output
from pretrain.views import ViewConfig, ViewsConfig, make_views

Share = Annotated[float, Field(gt=0, le=1)]


class MAEConfig(BaseModel):
    """MAE's hyperparameters; the defaults are the paper's (section 3 and table 8)."""

    model_config = ConfigDict(extra="forbid")

    encoder_kind: ClassVar = "vision"
    name: Literal["mae"] = "mae"
    mask_ratio: float = Field(default=0.75, gt=0.0, lt=1.0)
    """Share of patches hidden from the encoder (section 3)."""
    decoder_width: int = Field(default=512, ge=1)
    """Width of the decoder (table 1b)."""
    decoder_depth: int = Field(default=8, ge=0)
    """Blocks of the decoder (table 1a)."""
    decoder_heads: int = Field(default=16, ge=1)
    """Attention heads of the decoder; they divide its width."""
    normalize_targets: bool = True
    """Predict pixels normalised by their patch's mean and variance (table 1d)."""
    crop_scale: tuple[Share, Share] = (0.2, 1.0)
    """Area of the random crop as a share of the picture (table 1e: random size)."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Its aspect, width over height."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Probability of a mirrored view."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ValueError(f"decoder_width {self.decoder_width} must be a multiple of decoder_heads and of 4")
        for name, (low, high) in {"crop_scale": self.crop_scale, "crop_ratio": self.crop_ratio}.items():
            if low > high:
                raise ValueError(f"{name} [{low}, {high}] must rise")
        return self


class MaskedAutoencoder(Objective):
    """MAE over any timm `VisionTransformer`."""

    encoder: VisionTransformer
    decoder_positions: Tensor

    def __init__(self, config: MAEConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        """Around `encoder`, or a new one.

        Raises:
            UserError: the encoder is no ViT, its patches do not tile the picture, or none would be hidden or visible.
        """
        super().__init__()
        self.config, self.vision = config, vision
        crop = ViewConfig(
            scale=config.crop_scale, ratio=config.crop_ratio, flip=config.flip, jitter=None, grey=0.0, blur=None
        )
        self.views = ViewsConfig(views=[crop])
        encoder = build_vision(vision) if encoder is None else encoder
        if not isinstance(encoder, VisionTransformer):
            raise UserError(f"mae needs a ViT, but encoder.model {vision.model} is a {type(encoder).__name__}")
        self.encoder = encoder
        rows, columns = encoder.patch_embed.grid_size
        self.patches = rows * columns
        self.grid = (rows, columns)
        self.patch = (vision.image_size // rows, vision.image_size // columns)
        """Height and width of a patch, in pixels."""
        if isinstance(encoder.patch_embed, PatchEmbed):  # others (hybrids) count patches on a feature map
            self.patch = encoder.patch_embed.patch_size
        if (rows * self.patch[0], columns * self.patch[1]) != (vision.image_size, vision.image_size):
            raise UserError(
                f"encoder.image_size {vision.image_size} is no multiple of the patches of {vision.model}, "
                f"{self.patch[0]} x {self.patch[1]} pixels; change one of them"
            )
        self.visible = round(self.patches * (1 - config.mask_ratio))
        if not 0 < self.visible < self.patches:
            raise UserError(
                f"objective.mask_ratio {config.mask_ratio} leaves {self.visible} of {self.patches} patches visible"
            )
        width = config.decoder_width
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_positions", sincos_positions(width, rows, columns)[None])
        blocks = [Block(width, config.decoder_heads, qkv_bias=True) for _ in range(config.decoder_depth - 1)]
        if config.decoder_depth:
            blocks.append(LastBlock(width, config.decoder_heads, self.patches - self.visible))
        self.decoder = nn.Sequential(*blocks)
        self.decoder_norm = nn.LayerNorm(width)
        self.decoder_head = nn.Linear(width, 3 * self.patch[0] * self.patch[1])
        self._initialise()

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """The squared error of the hidden patches, a mean over each patch's pixels (section 3)."""
        assert isinstance(batch, ImageBatch)
        images = self.view(batch)
        order = permutation(batch.keys, "mask", self.patches)
        predicted = self.decode(self.encode(images, order), order)
        error = (predicted.float() - self.targets(images, order)).square().mean(dim=-1)
        count = torch.tensor(float(error.numel()), device=error.device)
        return Output(loss_sum=error.sum(), target_count=count)

    def view(self, batch: ImageBatch) -> Tensor:
        """Random resized crop and flip in training, the central square otherwise: float32 (b, 3, s, s)."""
        if not self.training:
            return eval_view(batch, self.vision)
        return make_views(batch, self.views, self.vision)[0][0]

    def encode(self, images: Tensor, order: Tensor) -> Tensor:
        """Prefix tokens and the visible patches, encoded: (b, prefix + visible, d).

        `order` int64 (b, patches) is a permutation; its first `visible` entries are the patches that stay.
        """
        encoder = self.encoder
        return encoder.norm(encoder.blocks(encoder.norm_pre(self.embed(images, order))))

    def embed(self, images: Tensor, order: Tensor) -> Tensor:
        """Prefix tokens and the visible patches with their positions: (b, prefix + visible, d)."""
        encoder, prefix = self.encoder, self.encoder.num_prefix_tokens
        if not self._embeds_visible_alone():
            tokens = encoder._pos_embed(encoder.patch_embed(images))
            kept = repeat(order[:, : self.visible] + prefix, "b n -> b n d", d=tokens.shape[-1])
            return torch.cat([tokens[:, :prefix], tokens.gather(1, kept)], dim=1)
        # The same as a matrix product over visible pixels: a quarter of the work, and no gather to go back through.
        project, positions = encoder.patch_embed.proj, encoder.pos_embed
        pixels = self._patches(images)
        pixels = pixels.gather(1, repeat(order[:, : self.visible], "b n -> b n d", d=pixels.shape[-1]))
        tokens = F.linear(pixels, rearrange(project.weight, "d c p q -> d (p q c)"), project.bias)
        tokens = tokens + positions[0, -self.patches :][order[:, : self.visible]]
        first = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
        if first:
            before = torch.cat(first, dim=1)
            before = before if encoder.no_embed_class else before + positions[:, :prefix]
            tokens = torch.cat([before.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        return encoder.pos_drop(tokens)

    def _embeds_visible_alone(self) -> bool:
        """Whether patches are embedded one by one, by a convolution and nothing else."""
        encoder, embed = self.encoder, self.encoder.patch_embed
        plain = type(embed) is PatchEmbed and isinstance(embed.norm, nn.Identity) and embed.flatten
        return plain and encoder.pos_embed is not None and not encoder.dynamic_img_size

    def decode(self, encoded: Tensor, order: Tensor) -> Tensor:
        """Predicted pixels of the hidden patches, in `order`: (b, hidden, 3 * p * q) for patches of p x q pixels."""
        tokens = self.decoder_embed(encoded)
        prefix = tokens.shape[1] - self.visible
        hidden = self.patches - self.visible
        masks = self.mask_token.to(tokens.dtype).expand(len(tokens), hidden, -1)
        # Attention does not mind the order, so patches stay permuted and only their positions follow.
        places = self.decoder_positions.expand(len(tokens), -1, -1)
        places = places.gather(1, repeat(order, "b n -> b n d", d=places.shape[-1])).to(tokens.dtype)
        patches = torch.cat([tokens[:, prefix:], masks], dim=1) + places
        decoded = self.decoder(torch.cat([tokens[:, :prefix], patches], dim=1))
        return self.decoder_head(self.decoder_norm(decoded[:, -hidden:]))

    def targets(self, images: Tensor, order: Tensor) -> Tensor:
        """What to predict of each hidden patch, in `order`: float32 (b, hidden, 3 * p * q)."""
        pixels = self._hidden(self._patches(images), order)
        if not self.config.normalize_targets:
            return pixels
        # (x - mean) / sqrt(variance + 1e-6) with the unbiased variance, as one fused normalisation.
        count = pixels.shape[-1]
        unbiased = (count - 1) / count
        return F.layer_norm(pixels, (count,), eps=1e-6 * unbiased) * math.sqrt(unbiased)

    def _patches(self, images: Tensor) -> Tensor:
        return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch[0], q=self.patch[1])

    def _hidden(self, patches: Tensor, order: Tensor) -> Tensor:
        return patches.gather(1, repeat(order[:, self.visible :], "b n -> b n d", d=patches.shape[-1]))

    def sights(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Pictures, what the encoder gets of them, and what the decoder makes of that."""
        names = ("pictures", "with the hidden patches left out", "with the hidden patches predicted")
        return dict(zip(names, self.reconstruct(batch), strict=True))

    @torch.no_grad()
    def reconstruct(self, batch: ImageBatch) -> tuple[Tensor, Tensor, Tensor]:
        """For looking at: pictures, the same with hidden patches grey, and with predictions in their place.

        Each float32 (b, 3, s, s) in [0, 1]; predictions are rescaled by the true patch's mean and variance.
        """
        images = eval_view(batch, self.vision)
        order = permutation(batch.keys, "mask", self.patches)
        predicted = self.decode(self.encode(images, order), order).float()
        pixels = self._patches(images)
        if self.config.normalize_targets:
            variance, mean = torch.var_mean(self._hidden(pixels, order), dim=-1, keepdim=True)
            predicted = predicted * (variance + 1e-6).sqrt() + mean
        where = repeat(order[:, self.visible :], "b n -> b n d", d=pixels.shape[-1])
        masked, filled = pixels.scatter(1, where, 0.0), pixels.scatter(1, where, predicted)
        return self._picture(pixels), self._picture(masked), self._picture(filled)

    def _picture(self, patches: Tensor) -> Tensor:
        (rows, columns), (p, q) = self.grid, self.patch
        images = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=q)
        mean = torch.tensor(self.vision.mean, device=images.device)[:, None, None]
        return (images * torch.tensor(self.vision.std, device=images.device)[:, None, None] + mean).clamp(0, 1)

    def _initialise(self) -> None:
        """As the reference implementation: Xavier for matrices, 0.02 for tokens."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        weight = self.encoder.patch_embed.proj.weight
        nn.init.xavier_uniform_(rearrange(weight, "d c p q -> d (c p q)"))
        for token in (self.mask_token, self.encoder.cls_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
