"""All objectives for pictures: what a recipe may name, and what each name builds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator
from torch import nn

from pretrain.encoders.vision import VisionConfig
from pretrain.objectives.byol import BYOL, BYOLConfig
from pretrain.objectives.contrastive import MoCo, MoCoConfig, SimCLR, SimCLRConfig
from pretrain.objectives.latent import IJEPA, IJEPAConfig
from pretrain.objectives.lejepa import LeJEPA, LeJEPAConfig
from pretrain.objectives.masked_distillation import IBOT, DINOv2Config, IBOTConfig
from pretrain.objectives.masked_image import MAEConfig, MaskedAutoencoder
from pretrain.objectives.mixture import Mixture
from pretrain.objectives.protocol import Objective
from pretrain.objectives.redundancy import BarlowTwins, BarlowTwinsConfig, VICReg, VICRegConfig
from pretrain.objectives.self_distillation import DINO, DINOConfig
from pretrain.objectives.simmim import SimMIM, SimMIMConfig
from pretrain.objectives.supervised import Supervised, SupervisedConfig

SingleConfig = (
    MAEConfig
    | SimMIMConfig
    | IJEPAConfig
    | SimCLRConfig
    | MoCoConfig
    | BYOLConfig
    | BarlowTwinsConfig
    | VICRegConfig
    | LeJEPAConfig
    | DINOConfig
    | IBOTConfig
    | DINOv2Config
    | SupervisedConfig
)


class MixtureConfig(BaseModel):
    """Several objectives over one encoder."""

    model_config = ConfigDict(extra="forbid")

    encoder_kind: ClassVar = "vision"
    name: Literal["mixture"] = "mixture"
    members: dict[Annotated[str, Field(pattern=r"^\w+$")], Annotated[SingleConfig, Field(discriminator="name")]] = (
        Field(min_length=2)
    )
    """Objectives, each under a name of its own."""
    weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Of the members' mean losses; 1 where none is given."""
    export: str | None = None
    """The member whose encoder (a teacher, say) is evaluated and exported; the shared encoder without it."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        strangers = {*self.weights, *([self.export] if self.export else [])} - {*self.members}
        if strangers:
            raise ValueError(f"{', '.join(sorted(strangers))} is no member; there are {', '.join(self.members)}")
        return self


PictureConfig = SingleConfig | MixtureConfig


def build_mixture(config: MixtureConfig, vision: VisionConfig, encoder: nn.Module) -> Mixture:
    """A mixture with its members around `encoder`."""
    members = {name: partial(PICTURES[type(member)], member, vision) for name, member in config.members.items()}
    return Mixture(members, config.weights, encoder, config.export)


PICTURES: dict[type, Callable[[Any, Any, Any], Objective]] = {
    MAEConfig: MaskedAutoencoder,
    SimMIMConfig: SimMIM,
    IJEPAConfig: IJEPA,
    SimCLRConfig: SimCLR,
    MoCoConfig: MoCo,
    BYOLConfig: BYOL,
    BarlowTwinsConfig: BarlowTwins,
    VICRegConfig: VICReg,
    LeJEPAConfig: LeJEPA,
    DINOConfig: DINO,
    IBOTConfig: IBOT,
    DINOv2Config: IBOT,
    SupervisedConfig: Supervised,
    MixtureConfig: build_mixture,
}
"""By the type of a recipe's `objective`: called with it, the recipe's `encoder`, and the encoder built from that."""
