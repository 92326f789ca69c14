"""torchvision's names of architectures, and the same architectures' names in timm.

Weights of ResNets carry the same names in both, so an exported one loads in torchvision as it is.
"""

from __future__ import annotations

import difflib

PREFIX = "torchvision/"
_SAME = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("convnext_tiny", "convnext_small", "convnext_base", "convnext_large"),
    *("densenet121", "densenet161", "densenet169", "densenet201"),
    *(f"efficientnet_b{number}" for number in range(8)),
)
_OTHERWISE = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "swin_v2_s": "swinv2_small_window8_256",
    "swin_v2_b": "swinv2_base_window8_256",
}
NAMES = {name: name for name in _SAME} | _OTHERWISE


def timm_name(name: str) -> str:
    """timm's name of what `torchvision/NAME` stands for; any other name as it is.

    Raises:
        ValueError: no such architecture is known here.
    """
    if not name.startswith(PREFIX):
        return name
    plain = name.removeprefix(PREFIX)
    if plain not in NAMES:
        close = difflib.get_close_matches(plain, NAMES, n=2)
        hint = f"; did you mean {' or '.join(PREFIX + other for other in close)}?" if close else ""
        raise ValueError(f"no architecture of torchvision's is known as {plain!r}{hint}")
    return NAMES[plain]
