"""A ViT's tokens, some of them masked; and which encoders take pictures of other sizes."""

from __future__ import annotations

from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from data.errors import UserError


def require_vit(encoder: nn.Module, objective: str, model: str) -> VisionTransformer:
    """`encoder`, if it is a plain ViT whose patches tile the picture.

    Raises:
        UserError: it is not; hierarchical encoders have no patch tokens that could be left out or masked one by one.
    """
    if not isinstance(encoder, VisionTransformer):
        raise UserError(f"{objective} needs a ViT, but encoder.model {model} is a {type(encoder).__name__}")
    return encoder


def masked_tokens(encoder: VisionTransformer, images: Tensor, mask: Tensor | None, token: Tensor) -> Tensor:
    """All tokens of a ViT that sees `token` in the place of masked patches: (b, prefix + patches, d).

    Args:
        images: float (b, 3, s, s).
        mask: bool (b, patches), True where hidden; None for a look at everything.
        token: (d,), put there before positions are added (BEiT, section 2.3).
    """
    patches = encoder.patch_embed(images)
    if mask is not None:
        hidden = mask.view(*patches.shape[:-1], 1)
        patches = patches.where(~hidden, token.to(patches.dtype))
    return encoder.norm(encoder.blocks(encoder.norm_pre(encoder._pos_embed(patches))))


def require_sizes(encoder: nn.Module, sizes: set[int], size: int, model: str) -> None:
    """Raise `UserError` where an encoder for pictures of `size` pixels would refuse one of `sizes`."""
    patch = getattr(encoder, "patch_embed", None)
    if not isinstance(patch, PatchEmbed) or sizes <= {size}:
        return
    argument = "dynamic_img_size" if isinstance(encoder, VisionTransformer) else "strict_img_size"
    wanted = "true" if argument == "dynamic_img_size" else "false"
    if patch.strict_img_size:
        raise UserError(
            f"views of {', '.join(map(str, sorted(sizes - {size})))} pixels do not fit {model}, made for {size}; "
            f"set encoder.model_args.{argument}={wanted}, or give all views the same size"
        )
    step = max(patch.patch_size)
    odd = [side for side in sorted(sizes) if side % step]
    if odd:
        raise UserError(f"views of {odd[0]} pixels are no multiple of the patches of {model}, {step} pixels")
