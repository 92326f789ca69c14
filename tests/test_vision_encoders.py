"""Laws of picture encoders: names of two libraries, stems for small pictures, exports that load elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from pretrain_kit import recipe
from safetensors.torch import load_file
from torch.testing import assert_close

from data.errors import UserError
from pretrain.encoders.torchvision_names import NAMES
from pretrain.encoders.vision import VisionConfig, build_vision
from pretrain.loop import train


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_s_names_stand_for_the_same_architecture(name: str) -> None:
    config = VisionConfig(model=f"torchvision/{name}")
    assert timm.is_model(config.model)
    with torch.device("meta"):
        ours = timm.create_model(config.model, pretrained=False, num_classes=1000)
        theirs = torchvision.models.get_model(name, weights=None)
    count = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert count[0] == pytest.approx(count[1], rel=0.01)


def test_an_unknown_name_of_torchvision_s_is_explained() -> None:
    with pytest.raises(UserError, match=r"did you mean torchvision/resnet50"):
        recipe("simclr", Path("nowhere"), {"encoder.model": "torchvision/resnet05"})


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet50", 64), ("convnext_atto", 64), ("swin_tiny_patch4_window7_224", 64), ("vit_tiny_patch16_224", 64)],
)
def test_any_family_gives_pooled_features(name: str, size: int) -> None:
    arguments = {"window_size": 2} if "swin" in name else {}
    encoder = build_vision(VisionConfig(model=name, image_size=size, model_args=arguments)).eval()
    with torch.no_grad():
        found = encoder(torch.zeros(2, 3, size, size))
    assert found.shape == (2, encoder.num_features)


def test_a_cifar_resnet_s_export_loads_in_timm_and_its_weights_in_torchvision(digits: Path, tmp_path: Path) -> None:
    settings = {
        "encoder": {"kind": "vision", "model": "resnet18_cifar", "image_size": 16},
        "train.steps": 1,
        "train.batch_size": 4,
    }
    out = train(recipe("simclr", digits / "train", settings), tmp_path / "run")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    foreign = torchvision.models.resnet18(weights=None)
    foreign.conv1, foreign.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()  # type: ignore
    foreign.fc = torch.nn.Identity()  # type: ignore[assignment]
    foreign.load_state_dict(load_file(out / "model.safetensors"))
    with torch.no_grad():
        assert_close(foreign.eval()(images), model(images), atol=1e-5, rtol=1e-4)
        assert model.conv1(images).shape == (2, 64, 16, 16)
