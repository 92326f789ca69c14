"""Views of pictures: made on the training device, batched, each sample from its own key."""

from pretrain.views.config import BlurConfig, JitterConfig, Presentation, ViewConfig, ViewsConfig
from pretrain.views.crops import (
    Interpolation,
    center_boxes,
    crop_resize,
    flips,
    normalize,
    random_resized_crop_boxes,
)
from pretrain.views.make import make_views

__all__ = [
    "BlurConfig",
    "Interpolation",
    "JitterConfig",
    "Presentation",
    "ViewConfig",
    "ViewsConfig",
    "center_boxes",
    "crop_resize",
    "flips",
    "make_views",
    "normalize",
    "random_resized_crop_boxes",
]
