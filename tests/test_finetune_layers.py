"""Layer-wise decay: the same groups as timm's, the right scales for text, a gradient everywhere."""

from pathlib import Path

import pytest
import timm
import torch
from test_finetune_kit import VIT
from timm.optim import param_groups_layer_decay

from data.batch import ImageBatch
from finetune.encoder import Augmentation, load_encoder
from finetune.heads import LinearHead
from finetune.layers import default_decay, parameter_groups

pytest_plugins = ["test_finetune_kit"]


def _scales(groups: list[dict]) -> dict[int, tuple[float, float]]:
    return {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}


def test_groups_of_a_vit_are_timms(export: Path) -> None:
    encoder = load_encoder(export)
    head = LinearHead(encoder.features, 10)
    ours = _scales(parameter_groups(encoder, head, weight_decay=0.05, layer_decay=0.5))
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **VIT)
    theirs = _scales(param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5))
    by_name = dict(encoder.model.named_parameters())
    for name, parameter in model.named_parameters():
        mine = head.linear.get_parameter(name.removeprefix("head.")) if name.startswith("head.") else by_name[name]
        assert ours[id(mine)] == pytest.approx(theirs[id(parameter)]), name
    assert len(ours) == len(theirs)


def test_the_default_decay_follows_from_the_depth(export: Path) -> None:
    assert default_decay(12) == default_decay(24) == 0.75
    assert default_decay(4) == pytest.approx(1 - 4 / 48)
    assert default_decay(0) == default_decay(-1) == 1.0
    encoder = load_encoder(export)
    head = LinearHead(encoder.features, 10)
    blocks = {int(n.split(".")[2]) for n, _ in encoder.named_parameters() if n.startswith("model.blocks.")}
    given = parameter_groups(encoder, head, 0.05, default_decay(len(blocks)))
    assert _scales(parameter_groups(encoder, head, 0.05)) == _scales(given)
    assert min(group["lr_scale"] for group in given) < 1.0


def test_groups_of_a_resnet_cover_everything_from_stem_to_head(tmp_path: Path) -> None:
    from finetune.image_encoder import ImageEncoder

    model = timm.create_model("resnet18", pretrained=False, num_classes=0)
    encoder = ImageEncoder(model, tmp_path, {})
    groups = parameter_groups(encoder, LinearHead(512, 2), 0.05, 0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) + 2
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scales["model.conv1.weight"] < scales["model.layer1.0.conv1.weight"] < scales["model.layer4.1.conv2.weight"]
    assert scales["linear.weight"] == 1.0


def test_groups_of_a_text_encoder(text_export: Path) -> None:
    encoder = load_encoder(text_export)
    groups = parameter_groups(encoder, LinearHead(encoder.features, 2), 0.05, 0.5)
    found = {name: (group["lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found["model.embeddings.tok_embeddings.weight"] == (0.125, 0.0)
    assert found["model.layers.0.attn.Wqkv.weight"] == (0.25, 0.05)
    assert found["model.layers.1.mlp.Wo.weight"] == (0.5, 0.05)
    assert found["model.final_norm.weight"] == (0.5, 0.0)
    assert found["linear.weight"] == (1.0, 0.05)
    assert len(found) == len(list(encoder.parameters())) + 2


@pytest.mark.parametrize("kind", ["images", "text"])
def test_every_trainable_parameter_gets_a_gradient(kind: str, export: Path, text_export: Path) -> None:
    encoder = load_encoder(export if kind == "images" else text_export)
    keys = torch.arange(8)
    if kind == "images":
        images = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        sizes = torch.full((8, 2), 16)
        batch = ImageBatch(images=images, sizes=sizes, labels=keys, keys=keys, ids=keys)
    else:
        batch = encoder.batch(encoder.tokenize([f"the film number {i} was good" for i in range(8)]), keys, keys)
    head = LinearHead(encoder.features, 8, seed=0)
    logits = head(encoder(batch, Augmentation(flip=0.5)))
    torch.nn.functional.cross_entropy(logits, keys).backward()
    for name, parameter in [*encoder.named_parameters(), *head.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
