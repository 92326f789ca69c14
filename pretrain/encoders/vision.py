"""Picture encoders: timm's models, so that an export is a timm model too."""

from __future__ import annotations

import difflib
from typing import Any, Literal

import torch
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, field_validator
from timm import create_model, is_model, list_models
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data.batch import ImageBatch
from data.errors import UserError
from pretrain.encoders import resnet_cifar  # noqa: F401 - its models join timm's list
from pretrain.encoders.torchvision_names import timm_name
from pretrain.views import Interpolation, center_boxes, crop_resize, normalize


class VisionConfig(BaseModel):
    """Which picture encoder, and how pictures are presented to it."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["vision"] = "vision"
    model: str = "vit_small_patch16_224"
    """Name in timm, or one of torchvision's behind `torchvision/`, which stands for timm's of the same architecture."""
    image_size: int = Field(default=224, ge=1)
    """Side of the square input, in pixels."""
    model_args: dict[str, Any] = Field(default_factory=dict)
    """Passed to the timm model: patch_size, embed_dim, depth, num_heads, …"""
    pool: Literal["avg", "token"] = "avg"
    """How patch tokens become one feature vector in the export: their mean, or the class token."""
    positions: Literal["sincos", "learned"] = "sincos"
    """Fixed 2-D sine-cosine position embeddings (MAE, appendix A.1), or timm's learned ones."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from RGB in [0, 1]; ImageNet's by default."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.229, 0.224, 0.225)
    """Then divided by."""
    interpolation: Interpolation = "bicubic"
    """Filter for resizing."""

    @field_validator("model", mode="before")
    @classmethod
    def _known(cls, name: Any) -> Any:
        return timm_name(name) if isinstance(name, str) else name


def build_vision(config: VisionConfig) -> nn.Module:
    """The timm model without a classifier: `model(images)` gives pooled features (b, d).

    Raises:
        UserError: timm has no such model, or refuses the arguments.
    """
    if not is_model(config.model):
        close = difflib.get_close_matches(config.model, list_models(), n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise UserError(f"encoder.model: timm has no model {config.model!r}{hint}")
    try:
        model = create_model(config.model, pretrained=False, num_classes=0, **timm_arguments(config))
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"encoder: timm's {config.model} refuses {timm_arguments(config)}: {error}") from None
    if isinstance(model, VisionTransformer) and config.positions == "sincos" and model.pos_embed is not None:
        _fix_positions(model)
    return model


def timm_arguments(config: VisionConfig) -> dict[str, Any]:
    """The keyword arguments that make timm rebuild this encoder; they go into its `config.json`."""
    arguments = dict(config.model_args)
    if is_vision_transformer(config.model):
        # With mean pooling timm moves the final norm behind the pooling; fc_norm=False keeps it in front.
        arguments |= {"img_size": config.image_size, "global_pool": config.pool, "fc_norm": False}
    elif getattr(get_pretrained_cfg(config.model), "fixed_input_size", False):  # Swin and its like
        arguments.setdefault("img_size", config.image_size)
    return arguments


def is_vision_transformer(name: str) -> bool:
    """Whether timm's `name` is a plain ViT (built without memory to find out)."""
    with torch.device("meta"):
        return isinstance(create_model(name, pretrained=False), VisionTransformer)


def eval_view(batch: ImageBatch, config: VisionConfig) -> Tensor:
    """The view for features and evaluation: central square, resized, normalised; float32 (b, 3, s, s)."""
    boxes = center_boxes(batch.sizes)
    images = crop_resize(batch.images, boxes, config.image_size, interpolation=config.interpolation)
    return normalize(images, config.mean, config.std)


def sincos_positions(width: int, rows: int, columns: int) -> Tensor:
    """2-D sine-cosine embeddings (MoCo v3, section 4.3): float32 (rows * columns, width); width divides by 4."""
    if width % 4:
        raise UserError(f"a width of {width} cannot hold 2-D sine-cosine positions; use a multiple of 4")
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    down = torch.outer(torch.arange(rows, dtype=torch.float64), frequencies)
    across = torch.outer(torch.arange(columns, dtype=torch.float64), frequencies)
    shape = (rows, columns, width // 4)
    parts = [across.sin()[None].expand(shape), across.cos()[None].expand(shape)]
    parts += [down.sin()[:, None].expand(shape), down.cos()[:, None].expand(shape)]
    return rearrange(torch.cat(parts, dim=-1), "h w d -> (h w) d").float()


def _fix_positions(model: VisionTransformer) -> None:
    rows, columns = model.patch_embed.grid_size
    table = sincos_positions(model.embed_dim, rows, columns)
    prefix = model.pos_embed.shape[1] - table.shape[0]
    table = torch.cat([torch.zeros(prefix, table.shape[1]), table])
    with torch.no_grad():
        model.pos_embed.copy_(table[None])
    model.pos_embed.requires_grad_(False)
