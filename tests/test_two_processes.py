"""Laws of splitting: processes and microbatches see the same global batches and make the same gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_worker import observe
from pretrain_kit import NORMS, PICTURES, TEXTS, recipe, two_workers, write_recipe
from torch.testing import assert_close

from pretrain.setup import prepare

TOLERANCE = {"atol": 2e-6, "rtol": 2e-4}
"""float32 sums in another order."""
CASES: dict[str, dict[str, Any]] = {
    "mae": {"train.batch_size": 24},
    "mae, clipped": {"train.batch_size": 24, "train.clip": 0.01},
    **{name: {"train.batch_size": 12} for name in PICTURES},
    "simclr, batch norm": {"train.batch_size": 12} | NORMS,
    "moco, batch norm": {"train.batch_size": 12} | NORMS,
    "next_token": {"train.batch_size": 12, "objective.z_loss": 1e-3},
    "hybrid": {"train.batch_size": 12, "objective.combine": "sum"},
    "masked_language": {"train.batch_size": 12, "objective.unit": "word", "objective.replaced": 0.1},
    "replaced_token": {"train.batch_size": 12, "objective.generator.unit": "span"},
}
BATCHES = 2


def assert_gradients_close(found: dict[str, Any], joined: dict[str, Any]) -> None:
    """Rounding is as large as the whole gradient makes it: some of its parts are exactly zero but for that."""
    scale = max(1.0, joined["norm"])
    assert_close(found["gradient"], joined["gradient"], atol=TOLERANCE["atol"] * scale, rtol=TOLERANCE["rtol"])


def splits_exactly(case: str, microbatch: int | None) -> bool:
    """An encoder's BatchNorm normalises each microbatch by itself, over all processes: see `pretrain.norm`."""
    return microbatch is None or "batch norm" not in case


def settings(case: str, microbatch: int | None) -> dict[str, Any]:
    prefix = {"encoder.model_args.class_token": True} if objective(case) not in TEXTS else {}
    return {"train.clip": None, "train.microbatch": microbatch} | prefix | CASES[case]


def objective(case: str) -> str:
    return case.partition(",")[0]


def data_of(case: str, digits: Path, sentences: Path) -> Path:
    return sentences if objective(case) in TEXTS else digits / "train"


@pytest.fixture(scope="module")
def two(digits: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each of two processes observed, for each case, whole and in microbatches."""
    folder = tmp_path_factory.mktemp("two")
    paths, names = [], []
    for case in CASES:
        for microbatch in (None, 2):
            names.append(f"{case}/{microbatch}")
            path = folder / f"{len(names)}.yaml"
            data = data_of(case, digits, sentences)
            paths.append(write_recipe(path, objective(case), data, settings(case, microbatch)))
    both = two_workers("gradient_worker.py", folder, *paths)
    return {name: [both[0][place], both[1][place]] for place, name in enumerate(names)}


@pytest.mark.parametrize("microbatch", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_joined_batch_s_gradient(
    case: str,
    microbatch: int | None,
    two: dict[str, list[dict[str, Any]]],
    digits: Path,
    sentences: Path,
    tmp_path: Path,
) -> None:
    if not splits_exactly(case, microbatch):
        pytest.skip("an encoder with BatchNorm is not the same under accumulation")
    joined = observe(recipe(objective(case), data_of(case, digits, sentences), settings(case, None)), tmp_path)
    first, second = two[f"{case}/{microbatch}"]
    size = len(joined["ids"]) // BATCHES
    for name in ("ids", "views"):
        halves = []
        for number in range(BATCHES):
            for each in (first, second):
                halves += each[name][number * size // 2 : (number + 1) * size // 2]
        assert halves == joined[name]
    if objective(case) in TEXTS:
        assert first["targets"] != second["targets"], "the law is about unequal numbers of targets"
    for each in (first, second):
        assert each["count"] == joined["count"]
        assert each["loss"] == pytest.approx(joined["loss"], rel=1e-5)
        assert each["norm"] == pytest.approx(joined["norm"], rel=1e-4)
        assert each["metrics"] == pytest.approx(joined["metrics"], rel=1e-4)
        assert_close(each["running"], joined["running"], **TOLERANCE)
        assert_close(each["statistics"], joined["statistics"], **TOLERANCE)
        assert each["gradient"].keys() == joined["gradient"].keys()
        assert_gradients_close(each, joined)
    assert all(torch.equal(first["gradient"][n], second["gradient"][n]) for n in joined["gradient"])


@pytest.mark.parametrize("case", [case for case in CASES if splits_exactly(case, 1)])
def test_microbatches_make_the_joined_batch_s_gradient(
    case: str, digits: Path, sentences: Path, tmp_path: Path
) -> None:
    data = data_of(case, digits, sentences)
    joined = observe(recipe(objective(case), data, settings(case, None)), tmp_path)
    for microbatch in (2 if case == "supervised" else 1, 4):  # mixing pairs neighbours
        split = observe(recipe(objective(case), data, settings(case, microbatch)), tmp_path)
        assert (split["ids"], split["views"]) == (joined["ids"], joined["views"])
        assert_gradients_close(split, joined)
        assert split["loss"] == pytest.approx(joined["loss"], rel=1e-5)


def test_the_gradient_is_that_of_the_mean_over_targets(sentences: Path, tmp_path: Path) -> None:
    chosen = recipe("next_token", sentences, {"train.clip": None})
    found = observe(chosen, tmp_path, batches=1)
    setup = prepare(chosen, tmp_path)
    output = setup.state.objective(next(iter(setup.loader)), 0.3)
    (output.loss_sum / output.target_count).backward()
    plain = {name: p.grad for name, p in setup.state.objective.named_parameters() if p.grad is not None}
    assert_close(found["gradient"], plain, **TOLERANCE)
    assert found["norm"] == pytest.approx(torch.nn.utils.get_total_norm(list(plain.values())).item(), rel=1e-4)


def test_clipping_keeps_the_direction(digits: Path, tmp_path: Path) -> None:
    data = digits / "train"
    free = observe(recipe("mae", data, {"train.clip": None}), tmp_path, batches=1)["gradient"]
    clipped = observe(recipe("mae", data, {"train.clip": 0.1}), tmp_path, batches=1)["gradient"]
    norm = torch.nn.utils.get_total_norm(list(free.values()))
    assert norm > 0.1
    assert_close(clipped, {name: g * (0.1 / norm) for name, g in free.items()}, **TOLERANCE)
