"""ResNets for pictures of 32 x 32 pixels: timm's, with a 3 x 3 stem of stride 1 and no pooling behind it.

The stem is that of He et al. 2016, section 4.2, as SimCLR uses it (appendix B.9). timm has no such models: these join
its list when this module is imported, so an export of one loads in timm after that. Its weights also load in
torchvision's ResNet of the same depth once `conv1` and `maxpool` are replaced.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

__all__ = ["resnet18_cifar", "resnet34_cifar", "resnet50_cifar"]


class CifarResNet(ResNet):
    """A timm `ResNet` whose first stage sees the picture at full resolution."""

    conv1: nn.Module

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        stem: Any = self.conv1
        self.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, kernel_size=3, padding=1, bias=False)
        self.maxpool: nn.Module = nn.Identity()
        nn.init.kaiming_normal_(self.conv1.get_parameter("weight"), mode="fan_out", nonlinearity="relu")
        for info in self.feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features (b, d), or logits where there are classes."""
        return super().forward(x)


_PRESET: dict[str, Any] = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (4, 4),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
    "first_conv": "conv1",
    "classifier": "fc",
}
default_cfgs = generate_default_cfgs({f"resnet{depth}_cifar": _PRESET for depth in (18, 34, 50)})
"""What timm's `register_model` looks for in a module: the models' preprocessing."""


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-18: 11.2M parameters, 512 features."""
    return build_model_with_cfg(
        CifarResNet, "resnet18_cifar", pretrained, **({"block": BasicBlock, "layers": (2, 2, 2, 2)} | kwargs)
    )


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-34: 21.3M parameters, 512 features."""
    return build_model_with_cfg(
        CifarResNet, "resnet34_cifar", pretrained, **({"block": BasicBlock, "layers": (3, 4, 6, 3)} | kwargs)
    )


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50: 23.5M parameters, 2,048 features."""
    return build_model_with_cfg(
        CifarResNet, "resnet50_cifar", pretrained, **({"block": Bottleneck, "layers": (3, 4, 6, 3)} | kwargs)
    )
