"""Laws of the objectives that compare samples: losses are the papers', teachers get no gradient, state is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss
from pretrain_kit import PICTURES, recipe
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from data.batch import ImageBatch
from pretrain.build import build_objective
from pretrain.objectives.contrastive import nt_xent
from pretrain.objectives.protocol import JointObjective, Objective

NOWHERE = Path("nowhere")


def noise(count: int, canvas: int = 20, seed: int = 1) -> ImageBatch:
    generator = torch.Generator().manual_seed(seed)
    return ImageBatch(
        images=torch.randint(0, 256, (count, 3, canvas, canvas), generator=generator, dtype=torch.uint8),
        sizes=torch.randint(12, canvas + 1, (count, 2), generator=generator),
        labels=torch.arange(count) % 10,
        keys=torch.randint(-(2**62), 2**62, (count,), generator=generator),
        ids=torch.arange(count),
    )


def built(name: str, **settings: Any) -> Objective:
    return build_objective(recipe(name, NOWHERE, {f"objective.{key}": value for key, value in settings.items()}))


def embeddings(count: int = 12, width: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, count, width, generator=generator)
    return first, first + second


def test_simclr_s_loss_is_lightly_s() -> None:
    first, second = embeddings()
    a, b = F.normalize(first, dim=1), F.normalize(second, dim=1)
    loss, right = nt_xent(a, b, a, b, 0, 0.3)
    assert_close(loss / 24, NTXentLoss(temperature=0.3)(first, second))
    assert 0 < right <= 24


@pytest.mark.parametrize("name", ["barlow_twins", "vicreg"])
def test_redundancy_losses_are_lightly_s(name: str) -> None:
    objective = built(name)
    assert isinstance(objective, JointObjective)
    objective.projector = torch.nn.Identity()
    first, second = embeddings()
    output = objective.compare({"features": torch.stack([first, second], dim=1)}, 0.0)
    reference = BarlowTwinsLoss() if name == "barlow_twins" else VICRegLoss()
    assert_close(output.loss_sum / output.target_count, reference(first, second), atol=1e-5, rtol=1e-4)


def test_byol_s_loss_is_lightly_s_but_for_a_constant() -> None:
    objective = built("byol")
    assert isinstance(objective, JointObjective)
    features, targets = torch.stack(embeddings(width=32), dim=1), torch.stack(embeddings(width=32), dim=1)
    output = objective.compare({"features": features, "targets": targets}, 0.0)
    student = [objective.predictor(objective.projector(features[:, i])) for i in (0, 1)]  # type: ignore[operator]
    teacher = [objective.teacher.projector(targets[:, i]) for i in (0, 1)]  # type: ignore[union-attr,operator]
    cosine = NegativeCosineSimilarity()
    expected = 4 + 2 * (cosine(student[0], teacher[1]) + cosine(student[1], teacher[0]))
    assert_close(output.loss_sum / output.target_count, expected)


def test_frozen_patches_get_no_gradient_and_all_else_does() -> None:
    objective = built("moco", frozen_patches=True)
    objective(noise(6), 0.0).loss_sum.backward()
    without = {name for name, p in objective.encoder.named_parameters() if p.grad is None}
    assert without == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_moco_s_loss_is_written_out() -> None:
    objective = built("moco", temperature=0.2, queue=5)
    assert isinstance(objective, JointObjective)
    features, keys = torch.stack(embeddings(width=32), dim=1), torch.stack(embeddings(width=32), dim=1)
    output = objective.compare({"features": features, "keys": keys}, 0.0)
    expected = torch.zeros(())
    for i, j in ((0, 1), (1, 0)):
        q = F.normalize(objective.predictor(objective.projector(features[:, i])), dim=1)  # type: ignore[operator]
        k = F.normalize(objective.teacher.projector(keys[:, j]), dim=1)  # type: ignore[union-attr,operator]
        for row in range(len(q)):
            logits = torch.cat([k @ q[row], objective.queue @ q[row]]) / 0.2  # type: ignore[operator]
            expected = expected + 2 * 0.2 * (logits.logsumexp(0) - logits[row])
    assert_close(output.loss_sum, expected, atol=1e-4, rtol=1e-4)
    # The newest keys come first and push the oldest out.
    objective.after_step(0.5, output.statistics)
    assert_close(objective.queue[0], F.normalize(objective.teacher.projector(keys[:, 1]), dim=1)[0])  # type: ignore


WITH_TEACHER = [name for name in PICTURES if hasattr(built(name), "teacher")]


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_teacher_gets_no_gradient_and_follows(name: str) -> None:
    objective, batch = built(name), noise(6)
    output = objective(batch, 0.2)
    output.loss_sum.backward()
    teacher = dict(objective.teacher.named_parameters())  # type: ignore[union-attr]
    assert teacher
    assert all(p.grad is None and not p.requires_grad for p in teacher.values())
    with torch.no_grad():
        for p in objective.parameters():
            if p.requires_grad:
                p.add_(1.0)
    before = {n: p.clone() for n, p in teacher.items()}
    objective.after_step(0.0, output.statistics)
    student = dict(objective.named_parameters())
    moved = 0
    for n, p in teacher.items():
        if student[n].requires_grad:
            assert_close(p, before[n] + (1 - 0.9) * (student[n] - before[n]), atol=1e-5, rtol=1e-5)
            moved += 1
    assert moved > 3
    objective.after_step(1.0, output.statistics)
    assert all(torch.equal(p, p) for p in teacher.values())


@pytest.mark.parametrize("name", PICTURES)
def test_a_forward_pass_changes_nothing_but_batch_norm_s_statistics(name: str) -> None:
    objective = built(name)
    before = {n: t.clone() for n, t in objective.state_dict().items()}
    objective(noise(6), 0.3)
    after = objective.state_dict()
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert [n for n in changed if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))] == []


@pytest.mark.parametrize("name", PICTURES)
def test_everything_trainable_gets_a_gradient(name: str) -> None:
    """Else DistributedDataParallel would wait for it for ever."""
    objective = built(name)
    output = objective(noise(6), 0.3)
    output.loss_sum.backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []
    assert torch.isfinite(output.loss_sum)
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("name", PICTURES)
def test_evaluation_draws_no_statistics(name: str) -> None:
    objective = built(name).eval()
    before = {n: t.clone() for n, t in objective.state_dict().items()}
    with torch.no_grad():
        outputs = [objective(noise(size), 1.0) for size in (5, 1)]
    assert all(torch.isfinite(output.loss_sum) for output in outputs)
    assert all(torch.equal(before[n], t) for n, t in objective.state_dict().items())
