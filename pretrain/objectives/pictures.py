"""All objectives for pictures: what a recipe may name, and what each name builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pretrain.objectives.byol import BYOL, BYOLConfig
from pretrain.objectives.contrastive import MoCo, MoCoConfig, SimCLR, SimCLRConfig
from pretrain.objectives.masked_distillation import IBOT, DINOv2Config, IBOTConfig
from pretrain.objectives.masked_image import MAEConfig, MaskedAutoencoder
from pretrain.objectives.protocol import Objective
from pretrain.objectives.redundancy import BarlowTwins, BarlowTwinsConfig, VICReg, VICRegConfig
from pretrain.objectives.self_distillation import DINO, DINOConfig

PictureConfig = (
    MAEConfig
    | SimCLRConfig
    | MoCoConfig
    | BYOLConfig
    | BarlowTwinsConfig
    | VICRegConfig
    | DINOConfig
    | IBOTConfig
    | DINOv2Config
)

PICTURES: dict[type, Callable[[Any, Any, Any], Objective]] = {
    MAEConfig: MaskedAutoencoder,
    SimCLRConfig: SimCLR,
    MoCoConfig: MoCo,
    BYOLConfig: BYOL,
    BarlowTwinsConfig: BarlowTwins,
    VICRegConfig: VICReg,
    DINOConfig: DINO,
    IBOTConfig: IBOT,
    DINOv2Config: IBOT,
}
"""By the type of a recipe's `objective`: called with it, the recipe's `encoder`, and the encoder built from that."""
