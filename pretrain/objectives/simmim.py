"""SimMIM (Xie et al., "SimMIM: a simple framework for masked image modeling", CVPR 2022).

The encoder sees the whole picture, masked blocks included, and one linear layer predicts their raw pixels. So it
fits any encoder with a feature map: ViTs and Swins, where a token stands for a masked patch, and ConvNets, where a
colour that is learned fills the masked pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from pydantic import Field
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data.batch import ImageBatch, TextBatch
from data.errors import UserError
from pretrain.encoders.tokens import masked_tokens
from pretrain.encoders.vision import VisionConfig, build_vision
from pretrain.objectives.one_view import OneViewConfig, one_view, plain_view
from pretrain.objectives.protocol import Objective, Output, Tensors
from pretrain.views import ViewConfig
from pretrain.views.masks import exactly_k


class SimMIMConfig(OneViewConfig):
    """SimMIM's hyperparameters; the defaults are the paper's (section 4.1)."""

    name: Literal["simmim"] = "simmim"
    views: list[ViewConfig] = Field(default_factory=lambda: plain_view((0.67, 1.0)), min_length=1)
    """One view: a random crop and flip."""
    mask_ratio: float = Field(default=0.6, gt=0, lt=1)
    """Share of masked blocks (table 2)."""
    mask_size: int = Field(default=32, ge=1)
    """Side of a masked block, in pixels (table 2)."""


class SimMIM(Objective):
    """Any encoder with a feature map, and a linear layer back to pixels."""

    def __init__(self, config: SimMIMConfig, vision: VisionConfig, encoder: nn.Module | None = None) -> None:
        """Around `encoder`, or a new one.

        Raises:
            UserError: the encoder has no feature map, or blocks do not tile the picture and its patches.
        """
        super().__init__()
        self.config, self.vision = config, vision
        self.encoder = build_vision(vision) if encoder is None else encoder
        blocks, rest = divmod(vision.image_size, config.mask_size)
        patch = _patch(self.encoder)
        if rest or config.mask_size % patch:
            raise UserError(
                f"objective.mask_size {config.mask_size} must divide encoder.image_size {vision.image_size} and be a "
                f"multiple of the patches of {vision.model}, {patch} pixels"
            )
        self.blocks, self.hidden = blocks, round(blocks * blocks * config.mask_ratio)
        if not 0 < self.hidden < blocks * blocks:
            raise UserError(f"objective.mask_ratio {config.mask_ratio} masks {self.hidden} of {blocks**2} blocks")
        width, stride = _shape(self.encoder, vision)
        self.mask_token = nn.Parameter(torch.zeros(_token_width(self.encoder)))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Sequential(nn.Conv2d(width, 3 * stride**2, kernel_size=1), nn.PixelShuffle(stride))
        _freeze_unused(self.encoder)

    def view(self, batch: ImageBatch) -> Tensors:
        """`images` float32 (b, 3, s, s) and `mask` bool (b, blocks, blocks), True where masked."""
        mask = exactly_k(batch.keys, self.blocks**2, self.hidden)
        images = one_view(batch, self.config, self.vision, self.training)
        return {"images": images, "mask": rearrange(mask, "b (h w) -> b h w", h=self.blocks)}

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """Absolute error of masked pixels, a mean over colours (section 3.3); targets are pixels."""
        assert isinstance(batch, ImageBatch)
        views = self.view(batch)
        predicted = self.decoder(masked_map(self.encoder, views["images"], views["mask"], self.mask_token))
        error = (predicted.float() - views["images"]).abs().mean(dim=1)
        error = error * _grown(views["mask"], self.config.mask_size)
        pixels = float(len(error) * self.hidden * self.config.mask_size**2)
        return Output(error.sum(), error.new_tensor(pixels))


def masked_map(encoder: nn.Module, images: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    """The last feature map (b, d, h, w) of an encoder to which the blocks in `mask` (b, rows, columns) are hidden."""
    if isinstance(encoder, VisionTransformer):
        rows, columns = encoder.patch_embed.grid_size
        tokens = masked_tokens(encoder, images, _grown(mask, rows // mask.shape[1]).flatten(1), token)
        return rearrange(tokens[:, encoder.num_prefix_tokens :], "b (h w) d -> b d h w", h=rows, w=columns)
    if isinstance(encoder, SwinTransformer | SwinTransformerV2):
        patches = encoder.patch_embed(images)
        hidden = _grown(mask, patches.shape[1] // mask.shape[1])[..., None]
        patches = patches.where(~hidden, token.to(patches.dtype))
        return rearrange(encoder.norm(encoder.layers(patches)), "b h w d -> b d h w")
    hidden = _grown(mask, images.shape[2] // mask.shape[1])[:, None]
    features = encoder.forward_features(images.where(~hidden, token[:, None, None]))  # type: ignore[operator]
    return features


def _grown(mask: Tensor, factor: int) -> Tensor:
    """Every entry of (b, h, w) as a square of `factor` x `factor`."""
    return mask.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _patch(encoder: nn.Module) -> int:
    """Side of a patch in pixels; 1 for a ConvNet."""
    if isinstance(encoder, VisionTransformer | SwinTransformer | SwinTransformerV2):
        return max(encoder.patch_embed.patch_size)
    return 1


def _token_width(encoder: nn.Module) -> int:
    return int(encoder.embed_dim) if _patch(encoder) > 1 else 3  # type: ignore[arg-type]


def _shape(encoder: nn.Module, vision: VisionConfig) -> tuple[int, int]:
    """Width of the last feature map, and how many pixels one of its places stands for."""
    side = vision.image_size
    with torch.no_grad():
        images = torch.zeros(1, 3, side, side, device=next(encoder.parameters()).device)
        training = encoder.training
        encoder.eval()  # so that BatchNorm learns nothing from it
        token = images.new_zeros(_token_width(encoder))
        features = masked_map(encoder, images, torch.zeros(1, 1, 1, dtype=torch.bool, device=images.device), token)
        encoder.train(training)
    if features.ndim != 4 or features.shape[2] != features.shape[3] or side % features.shape[2]:
        raise UserError(
            f"simmim needs an encoder with a square feature map, such as a ViT, Swin or ResNet; that of "
            f"{vision.model} for {side} pixels is {tuple(features.shape[1:])}"
        )
    return features.shape[1], side // features.shape[2]


def _freeze_unused(encoder: nn.Module) -> None:
    """What comes behind the feature map (the norm in a ConvNeXt's head) gets no gradient and stays as it is."""
    head = getattr(encoder, "head", None)
    if isinstance(head, nn.Module):
        head.requires_grad_(False)
