"""What views of a picture an objective asks for: plain values, so that a recipe shows all of them."""

from __future__ import annotations

from typing import Annotated, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from pretrain.views.crops import Interpolation

Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]


class JitterConfig(BaseModel):
    """Colour jitter; factors as in torchvision's `ColorJitter` (SimCLR, appendix A)."""

    model_config = ConfigDict(extra="forbid")

    probability: Probability = 0.8
    """Share of views that are jittered."""
    brightness: float = Field(default=0.8, ge=0)
    """Factor drawn from [max(0, 1 - brightness), 1 + brightness]."""
    contrast: float = Field(default=0.8, ge=0)
    """The same for the distance to the view's mean grey."""
    saturation: float = Field(default=0.8, ge=0)
    """The same for the distance to each pixel's grey."""
    hue: float = Field(default=0.2, ge=0, le=0.5)
    """Shift drawn from [-hue, hue], in turns of the colour circle."""


class BlurConfig(BaseModel):
    """Gaussian blur (SimCLR, appendix A)."""

    model_config = ConfigDict(extra="forbid")

    probability: Probability = 0.5
    """Share of views that are blurred."""
    sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """Standard deviation in pixels of the view, drawn uniformly."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.sigma[0] > self.sigma[1]:
            raise ValueError(f"sigma {list(self.sigma)} must rise")
        return self


class ViewConfig(BaseModel):
    """How one view (or `count` alike) is made; the defaults are SimCLR's (Chen et al. 2020, appendix A)."""

    model_config = ConfigDict(extra="forbid")

    count: int = Field(default=1, ge=1)
    """Views of this kind; each draws its own parameters."""
    size: int | None = Field(default=None, ge=1)
    """Side in pixels; the encoder's `image_size` without it."""
    scale: tuple[Share, Share] = (0.08, 1.0)
    """Area of the random crop as a share of the picture."""
    ratio: tuple[PositiveFloat, PositiveFloat] = (3 / 4, 4 / 3)
    """Its aspect, width over height."""
    flip: Probability = 0.5
    """Probability of a mirrored view."""
    jitter: JitterConfig | None = Field(default_factory=JitterConfig)
    """Colour jitter; null for none."""
    grey: Probability = 0.2
    """Probability of a view without colour."""
    blur: BlurConfig | None = Field(default_factory=BlurConfig)
    """Gaussian blur; null for none."""
    solarize: Probability = 0.0
    """Probability that bright pixels (0.5 and above) are inverted (BYOL, appendix B)."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        for name, (low, high) in {"scale": self.scale, "ratio": self.ratio}.items():
            if low > high:
                raise ValueError(f"{name} [{low}, {high}] must rise")
        return self


class ViewsConfig(BaseModel):
    """All views of a picture, in the order in which an objective gets them; global crops come first."""

    model_config = ConfigDict(extra="forbid")

    views: list[ViewConfig] = Field(default_factory=lambda: [ViewConfig(count=2)], min_length=1)
    """Kinds of view; their counts add up."""

    @property
    def count(self) -> int:
        """Views of one picture."""
        return sum(view.count for view in self.views)


class Presentation(Protocol):
    """How an encoder wants its pictures; `VisionConfig` is one."""

    @property
    def image_size(self) -> int:
        """Side in pixels."""

    @property
    def mean(self) -> tuple[float, float, float]:
        """Subtracted from RGB in [0, 1]."""

    @property
    def std(self) -> tuple[float, float, float]:
        """Then divided by."""

    @property
    def interpolation(self) -> Interpolation:
        """Filter for resizing."""
