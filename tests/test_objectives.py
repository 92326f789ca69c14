"""Laws of the objectives without a partner view: LeJEPA, SimMIM, I-JEPA, supervised, and mixtures of objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss
from pretrain_kit import MAE, PICTURES, recipe
from test_comparing import noise
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from data.errors import UserError
from pretrain.build import build_objective
from pretrain.objectives.latent import IJEPA
from pretrain.objectives.lejepa import LeJEPA
from pretrain.objectives.mixture import Mixture
from pretrain.objectives.protocol import Objective
from pretrain.objectives.simmim import SimMIM
from pretrain.objectives.supervised import Supervised

NOWHERE = Path("nowhere")


def built(name: str, settings: dict[str, Any] | None = None) -> Any:
    return build_objective(recipe(name, NOWHERE, settings or {}))


def test_lejepa_s_loss_is_lightly_s() -> None:
    objective: LeJEPA = built("lejepa")
    objective.projector = torch.nn.Identity()  # type: ignore[assignment]
    features, keys = torch.randn(7, 4, 6), torch.arange(7)
    output = objective.compare({"features": features, "keys": keys}, 0.0)
    reference = SIGReg(num_vectors=20)
    directions = objective.directions(keys, 6)
    reference._generate_unit_vectors = lambda *_: directions  # type: ignore[method-assign]
    views = features.transpose(0, 1)
    invariance = lejepa_invariance_loss(all_proj=views, global_proj=views[:2])
    assert_close(output.loss_sum / 7, 0.05 * reference(views) + 0.95 * invariance)
    assert_close(output.metrics["invariance"] / 7, invariance)


def test_lejepa_s_directions_are_unit_and_uniform() -> None:
    objective: LeJEPA = built("lejepa", {"objective.slices": 4000})
    found = objective.directions(torch.tensor([5]), 3)
    assert_close(found.norm(dim=0), torch.ones(4000))
    assert found.mean(dim=1).abs().max() < 0.05
    assert_close(found @ found.T / 4000, torch.eye(3) / 3, atol=0.03, rtol=0)
    assert not torch.equal(found, objective.directions(torch.tensor([6]), 3))


def test_sigreg_is_lowest_for_a_gaussian() -> None:
    objective: LeJEPA = built("lejepa")
    count = torch.tensor(2000.0)
    directions = objective.directions(torch.tensor([5]), 6)
    gaussian = torch.randn(1, 2000, 6)
    spread = [objective.sigreg(x, directions, count) for x in (gaussian, 0.3 * gaussian, gaussian.sign())]
    assert spread[0] < 0.2 * min(spread[1], spread[2])


ENCODERS: dict[str, dict[str, Any]] = {
    "vit": MAE["encoder"] | {"image_size": 32},
    "vit, class token": MAE["encoder"]
    | {"image_size": 32, "model_args": MAE["encoder"]["model_args"] | {"class_token": True}},
    "swin": {
        "kind": "vision",
        "model": "swin_tiny_patch4_window7_224",
        "image_size": 32,
        "model_args": {
            "patch_size": 4,
            "window_size": 2,
            "embed_dim": 16,
            "depths": [1, 2],
            "num_heads": [1, 2],
            "drop_path_rate": 0.0,
        },
    },
    "convnext": {
        "kind": "vision",
        "model": "convnext_atto",
        "image_size": 32,
        "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    },
    "resnet": {
        "kind": "vision",
        "model": "resnet18_cifar",
        "image_size": 32,
        "model_args": {"channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]},
    },
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_simmim_hides_blocks_from_any_encoder_with_a_feature_map(encoder: str) -> None:
    settings = {"encoder": ENCODERS[encoder], "objective.mask_size": 8}
    objective: SimMIM = built("simmim", settings)
    batch = noise(4, 40)
    views = objective.view(batch)
    assert views["mask"].sum(dim=(1, 2)).tolist() == [round(16 * 0.6)] * 4
    output = objective(batch, 0.0)
    output.loss_sum.backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []
    # As the paper's code: the masked pixels' absolute error over their number and the colours.
    seen: list[Tensor] = []
    objective.decoder.register_forward_hook(lambda *found: seen.append(found[-1]))
    state = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    objective(batch, 0.0)
    objective.load_state_dict(state)
    pixels = views["mask"].repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)
    expected = (seen[0] - views["images"]).abs()[pixels].mean()
    assert_close(output.loss_sum / output.target_count, expected)
    # What is hidden does not reach the prediction.
    objective.view = lambda _: views | {"images": views["images"] + pixels * 3.0}  # type: ignore[method-assign]
    objective(batch, 0.0)
    assert_close(seen[1], seen[0])


def test_ijepa_predicts_what_the_teacher_sees_from_the_context_alone() -> None:
    objective: IJEPA = built("ijepa")
    batch = noise(5)
    views = objective.view(batch)
    images, context, targets = views["images"], views["context"], views["targets"]
    assert context.shape == (5, 5)
    assert targets.shape == (5, 4, 3)
    for row in range(5):
        assert not set(context[row].tolist()) & set(targets[row].flatten().tolist())
    felt = images.clone().requires_grad_()
    objective.encode(felt, context).square().sum().backward()
    assert felt.grad is not None
    patches = felt.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum(dim=(1, 4, 5)).flatten(1)
    for row in range(5):
        assert set(patches[row].nonzero().flatten().tolist()) == set(context[row].tolist())
    # The definition, patch by patch.
    teacher = objective.teacher.get_submodule("encoder")
    tokens = teacher.forward_features(images)  # type: ignore[operator]
    predicted = objective.predict(objective.encode(images, context), context, targets)
    total = torch.zeros(())
    for row in range(5):
        for block in range(4):
            for place, patch in enumerate(targets[row, block]):
                total = total + F.smooth_l1_loss(predicted[row, block, place], F.layer_norm(tokens[row, patch], (32,)))
    output = objective(batch, 0.0)
    assert output.target_count == 5 * 4 * 3
    assert_close(output.loss_sum, total, atol=1e-4, rtol=1e-4)


def test_ijepa_s_blocks_are_predicted_one_by_one() -> None:
    objective: IJEPA = built("ijepa")
    views = objective.view(noise(2))
    encoded = objective.encode(views["images"], views["context"])
    whole = objective.predict(encoded, views["context"], views["targets"])
    alone = objective.predict(encoded, views["context"], views["targets"][:, 2:3])
    assert_close(whole[:, 2:3], alone)


def test_supervised_is_cross_entropy_and_skips_what_has_no_label() -> None:
    objective: Supervised = built("supervised", {"objective.mix": None, "objective.smoothing": 0.1})
    batch = noise(6)
    logits = objective.classifier(objective.encoder(objective.view(batch)["images"]))
    expected = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
    output = objective(batch, 0.0)
    assert_close(output.loss_sum / output.target_count, expected)
    batch.labels[2] = -1
    fewer = objective(batch, 0.0)
    assert fewer.target_count == 5
    kept = [0, 1, 3, 4, 5]
    assert_close(fewer.loss_sum / 5, F.cross_entropy(logits[kept], batch.labels[kept], label_smoothing=0.1))


def test_supervised_mixes_neighbours_in_training_alone() -> None:
    objective: Supervised = built("supervised", {"objective.smoothing": 0.0})
    batch = noise(6)
    targets = objective.view(batch)["targets"]
    assert_close(targets.sum(1), torch.ones(6))
    assert (targets > 0).sum() > 6
    assert all(set(row.nonzero().flatten().tolist()) <= {n & ~1, n | 1} for n, row in enumerate(targets))
    assert torch.equal(objective.eval().view(batch)["targets"], F.one_hot(batch.labels, 10).float())
    objective.train()
    batch.labels[3] = -1
    assert (objective.view(batch)["targets"].sum(1) == 0).tolist() == [False, False, True, True, False, False]


def test_a_mixture_is_the_weighted_sum_of_its_members() -> None:
    mixture: Mixture = built("mixture")
    batch = noise(6)
    outputs: dict[str, Any] = {name: member(batch, 0.3) for name, member in mixture.parts().items()}
    expected = sum(
        (0.5 if name == "contrast" else 1.0) * output.loss_sum / output.target_count for name, output in outputs.items()
    )
    output = mixture(batch, 0.3)
    assert_close(output.loss_sum / output.target_count, expected)
    assert_close(output.metrics["pixels/loss"] / 6, outputs["pixels"].loss_sum / outputs["pixels"].target_count)
    assert output.statistics.keys() == {f"teacher/{n}" for n in ("center", "views")} | {
        f"latents/{n}" for n in ("center", "views", "patch_center", "patches")
    }


def test_a_mixture_holds_its_encoder_once_and_exports_the_chosen_one() -> None:
    mixture: Mixture = built("mixture")
    members = mixture.parts()
    assert all(member.encoder is mixture.encoder for member in members.values())
    pointers = [tensor.data_ptr() for tensor in mixture.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    teacher = members["teacher"].exported()
    assert mixture.exported() is teacher is not mixture.encoder
    student = dict(mixture.encoder.named_parameters())
    assert all(torch.equal(p, student[n]) for n, p in teacher.named_parameters()), "a teacher starts as its student"
    moved = list(mixture.double().encoder.parameters())
    assert all(tensor.dtype == torch.float64 for tensor in moved)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("simmim", {"objective.mask_size": 6}, "mask_size 6 must divide"),
        ("simmim", {"objective.mask_ratio": 0.01}, "masks 0 of 16"),
        (
            "simmim",
            {
                "encoder.model": "mixer_s32_224",
                "encoder.model_args": {},
                "encoder.image_size": 224,
                "objective.mask_size": 32,
            },
            "feature map",
        ),
        ("ijepa", {"encoder": ENCODERS["resnet"]}, "ijepa needs a ViT"),
        ("moco", {"encoder": ENCODERS["resnet"], "objective.frozen_patches": True}, "frozen_patches needs a ViT"),
        ("ijepa", {"objective.context_share": 0.95}, "context_share"),
        ("ijepa", {"objective.predictor_heads": 3}, "multiple of predictor_heads"),
        ("supervised", {"objective.classes": None}, "objective.classes is open"),
        ("supervised", {"objective.views": [{"count": 2}]}, "exactly one view"),
        ("simclr", {"objective.views": [{"count": 3}]}, "exactly two views"),
        ("mixture", {"objective.weights": {"nobody": 1.0}}, "nobody is no member"),
        ("mixture", {"objective.members.contrast.temprature": 1.0}, "temprature"),
        ("mixture", {"objective.members.contrast.name": "simclear"}, "simclear"),
    ],
)
def test_mistakes_are_named(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        built(name, settings)


@pytest.mark.parametrize("name", PICTURES)
def test_objectives_come_back_from_their_state(name: str) -> None:
    first: Objective = built(name)
    second: Objective = built(name, {"seed": 1})
    batch = noise(6)
    output = first(batch, 0.4)
    first.after_step(0.4, output.statistics)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(batch, 0.5).loss_sum, second(batch, 0.5).loss_sum)
