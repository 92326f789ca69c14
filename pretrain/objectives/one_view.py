"""What the methods with one plain view of each picture share: a random resized crop and a flip."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import model_validator
from torch import Tensor

from data.batch import ImageBatch
from pretrain.encoders.vision import VisionConfig, eval_view
from pretrain.views import ViewConfig, ViewsConfig, make_views


def plain_view(scale: tuple[float, float], flip: float = 0.5) -> list[ViewConfig]:
    """One crop and flip, without changes of colour."""
    return [ViewConfig(scale=scale, flip=flip, jitter=None, grey=0.0, blur=None)]


class OneViewConfig(ViewsConfig):
    """One view, of the encoder's size."""

    encoder_kind: ClassVar = "vision"

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.count != 1 or self.views[0].size is not None:
            raise ValueError("needs exactly one view, of the encoder's image_size")
        return self


def one_view(batch: ImageBatch, config: OneViewConfig, vision: VisionConfig, training: bool) -> Tensor:
    """The random view in training, the central square otherwise: float32 (b, 3, s, s)."""
    return make_views(batch, config, vision)[0][0] if training else eval_view(batch, vision)
