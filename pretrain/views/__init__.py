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
from pretrain.views.masks import BlockwiseMask, MultiBlockMask, blockwise, exactly_k, multi_block
from pretrain.views.mixing import MixConfig, mix, mixed_targets

__all__ = [
    "BlockwiseMask",
    "BlurConfig",
    "Interpolation",
    "JitterConfig",
    "MixConfig",
    "MultiBlockMask",
    "Presentation",
    "ViewConfig",
    "ViewsConfig",
    "blockwise",
    "center_boxes",
    "crop_resize",
    "exactly_k",
    "flips",
    "make_views",
    "mix",
    "mixed_targets",
    "multi_block",
    "normalize",
    "random_resized_crop_boxes",
]
