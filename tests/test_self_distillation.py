"""Laws of DINO, iBOT and DINOv2: heads, losses and regularisers are those of the papers (and of lightly)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from lightly.models.modules.heads import DINOProjectionHead
from pretrain_kit import recipe
from test_comparing import noise
from torch.nn import functional as F
from torch.testing import assert_close

from data.errors import UserError
from pretrain.build import build_objective
from pretrain.objectives.masked_distillation import IBOT
from pretrain.objectives.prototypes import PrototypeHead, centred, cross_entropy, koleo, sinkhorn
from pretrain.objectives.self_distillation import DINO

NOWHERE = Path("nowhere")


def built(name: str, settings: dict[str, Any] | None = None) -> DINO:
    objective = build_objective(recipe(name, NOWHERE, settings or {}))
    assert isinstance(objective, DINO)
    return objective


def test_the_head_is_lightly_s() -> None:
    ours, theirs = PrototypeHead(10, 12, 6, 9), DINOProjectionHead(10, 12, 6, 9)
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        mine.load_state_dict(other.state_dict())
    with torch.no_grad():
        ours.prototypes.copy_(theirs.last_layer.weight_v)
    features = torch.randn(7, 10)
    assert_close(ours(features), theirs(features))


def test_frozen_prototypes_do_not_move() -> None:
    head = PrototypeHead(10, 12, 6, 9)
    head(torch.randn(3, 10), frozen=True).square().sum().backward()
    assert head.prototypes.grad is not None
    assert head.prototypes.grad.abs().max() == 0
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in head.layers.parameters())


def test_the_loss_over_views_is_lightly_s() -> None:
    objective = built("dino", {"objective.teacher_temperature": [0.05, 0.05]})
    objective.center.uniform_(-0.3, 0.3)
    features, targets = torch.randn(5, 4, 32), torch.randn(5, 2, 32)
    output = objective.compare({"features": features, "targets": targets}, 0.5)
    reference = DINOLoss(output_dim=12, teacher_temp=0.05, student_temp=0.1, center_momentum=0.9)
    reference.center.copy_(objective.center)
    teacher = list(objective.teacher.head(targets).unbind(1))  # type: ignore[operator]
    student = list(objective.head(features).unbind(1))
    assert_close(output.loss_sum / output.target_count, reference(teacher, student))
    objective.after_step(0.5, output.statistics)
    assert_close(objective.center, reference.center.flatten())


def test_the_loss_over_patches_is_lightly_s() -> None:
    objective = built("ibot", {"objective.teacher_temperature": [0.05, 0.05]})
    assert isinstance(objective, IBOT)
    objective.patch_center.uniform_(-0.3, 0.3)
    views = objective.view(noise(6))
    masks = views["masks"]
    assert 0 < masks.sum() < masks.numel() / 2
    embeddings = objective.embed(views, 0.5) | objective.observe(views, 0.5)
    output = objective.compare(embeddings, 0.5)
    reference = IBOTPatchLoss(output_dim=12, teacher_temp=0.05, student_temp=0.1, center_momentum=0.9)
    reference.center.center.copy_(objective.patch_center)
    teacher = objective.teacher.head(embeddings["patch_targets"][masks])  # type: ignore[operator]
    student = objective.head(embeddings["patches"][masks])
    # Its mask has a row a view, its mean is over views.
    expected = reference(teacher, student, masks.flatten(0, 1)[:, :, None])
    assert_close(output.metrics["patch_loss"] / 6, expected.detach())
    objective.after_step(0.5, output.statistics)
    assert_close(objective.patch_center, reference.center.center.flatten())


def test_masked_patches_are_hidden_from_the_student_alone() -> None:
    objective = built("ibot", {"objective.mask_probability": 1.0})
    batch = noise(3)
    views = objective.view(batch)
    masks = views["masks"]
    assert (masks.sum(2) > 0).all()
    pixels = masks.view(3, 2, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).transpose(0, 1)[:, :, None]
    changed = views | {"view0": torch.where(pixels, views["view0"] + 1.0, views["view0"])}
    plain, other = objective.embed(views, 0.5), objective.embed(changed, 0.5)
    assert_close(plain, other)
    assert not torch.allclose(objective.observe(views, 0.5)["targets"], objective.observe(changed, 0.5)["targets"])


def test_sinkhorn_is_lightly_s_and_uses_prototypes_alike() -> None:
    logits = F.normalize(torch.randn(40, 8), dim=1)
    assigned = sinkhorn(logits, 0.1, lambda x: x, iterations=3)
    assert_close(assigned, lightly_sinkhorn(logits, iterations=3, epsilon=0.1), atol=1e-5, rtol=1e-4)
    assert_close(assigned.sum(1), torch.ones(40))
    even = sinkhorn(logits, 0.1, lambda x: x, iterations=50).sum(0)
    assert even.max() / even.min() < 1.01
    assert sinkhorn(logits[:0], 0.1, lambda x: x).shape == (0, 8)


def test_koleo_is_lightly_s() -> None:
    features = F.normalize(torch.randn(9, 5), dim=1)
    assert_close(koleo(features, features, 0) / 9, KoLeoLoss()(features), atol=1e-5, rtol=1e-4)


def test_the_centre_keeps_one_prototype_from_winning() -> None:
    logits = torch.randn(50, 6) * 0.01 + torch.tensor([1.0, 0, 0, 0, 0, 0])
    assert (logits.argmax(1) == 0).all()
    assert (centred(logits, logits.mean(0), 0.04).argmax(1) == 0).float().mean() < 0.5


def test_cross_entropy_is_the_definition() -> None:
    assigned, logits = torch.rand(4, 6).softmax(1), torch.randn(4, 6)
    expected = -(assigned * (logits / 0.1).softmax(1).log()).sum(1)
    assert_close(cross_entropy(assigned, logits, 0.1), expected)


def test_accumulation_costs_a_second_pass_only_where_samples_are_compared() -> None:
    assert [built(name).joint for name in ("dino", "ibot", "dinov2")] == [False, False, True]
    assert built("dino", {"objective.koleo_weight": 0.1}).joint


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"encoder.model_args.dynamic_img_size": False}, "dynamic_img_size=true"),
        ({"objective.views": [{"count": 2}, {"size": 10}]}, "no multiple of the patches"),
        ({"objective.views": [{"count": 1}]}, "at least two views"),
    ],
)
def test_views_that_do_not_fit_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        built("dino", settings)


def test_masked_patches_need_a_vit() -> None:
    with pytest.raises(UserError, match="ibot needs a ViT"):
        built("ibot", {"encoder": {"kind": "vision", "model": "resnet18_cifar", "image_size": 32}})
