"""Several tasks together: one task is that task alone, shares are exact, every head is saved."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_finetune_kit import NAMES, digits, write_images

from data.errors import UserError
from data.requests import Share
from finetune.encoder import load_encoder
from finetune.evaluation import evaluate
from finetune.mixed_loader import MixedLoader, sampling_shares
from finetune.model import load_model
from finetune.multitask import multitask
from finetune.run import finetune
from finetune.tasks import load_task

pytest_plugins = ["test_finetune_kit"]
QUICK = {"cpu": True, "min_steps": 10, "epochs": 1.0, "batch_size": 16, "lr": 2e-3}
Pair = tuple[Path, Path]


def _silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Digits by name and, other pictures, by being odd."""
    images, labels = digits()
    root = tmp_path_factory.mktemp("tasks")
    odd = labels % 2
    made = {"digit": (labels, NAMES, slice(0, 600)), "odd": (odd, ["even", "odd"], slice(600, 800))}
    test = slice(1300, 1797)
    return {
        name: (
            write_images(root / name, images[part], truth[part], names),
            write_images(root / f"{name}_test", images[test], truth[test], names),
        )
        for name, (truth, names, part) in made.items()
    }


def test_one_task_is_that_task_alone(export: Path, tasks: dict[str, Pair]) -> None:
    options = {"labels_per_class": 15, "report": _silent, **QUICK}
    found = multitask(export, {"digit": tasks["digit"]}, seeds=[1], **options)["tasks"]["digit"]
    alone = finetune(export, *tasks["digit"], strategy="full", seeds=[1], **options)
    assert found["alone"]["accuracy"] == alone["accuracy"]
    assert found["joint"]["accuracy"] == pytest.approx(alone["accuracy"], abs=0.005)


def test_every_head_is_saved_and_both_tasks_are_learnt(export: Path, tasks: dict[str, Pair], tmp_path: Path) -> None:
    options = QUICK | {"epochs": 2.0}
    results = multitask(export, tasks, sampling="equal", output=tmp_path / "m", report=_silent, **options)
    assert results["runs"][0]["shares"] == {"digit": 1, "odd": 1}
    assert results["runs"][0]["steps"] == 75 + 25
    for name, (_, test) in tasks.items():
        found = results["tasks"][name]
        assert found["joint"]["interval"][0] > found["majority_accuracy"]
        saved = evaluate(tmp_path / "m" / name, test, report=_silent, cpu=True)["accuracy"]
        assert saved == found["joint"]["accuracy"]
        lead = found["lead"]
        assert lead["difference"] == pytest.approx(found["joint"]["accuracy"] - found["alone"]["accuracy"])
    shared = [load_model(tmp_path / "m" / name).encoder.state_dict() for name in tasks]
    assert all(torch.equal(shared[0][n], shared[1][n]) for n in shared[0])


def test_a_rate_is_chosen_on_inner_splits(export: Path, tasks: dict[str, Pair]) -> None:
    options = {name: value for name, value in QUICK.items() if name != "lr"}
    run = multitask(export, tasks, labels_per_class=8, report=_silent, **options)["runs"][0]
    assert f"{run['lr']:g}" == max(run["inner_merit"], key=lambda rate: run["inner_merit"][rate])
    assert len(run["inner_merit"]) == 3


def test_shares_are_exact_in_every_cycle_and_each_task_sees_its_own_order(export: Path, tasks: dict[str, Pair]) -> None:
    encoder = load_encoder(export)
    samples = {name: load_task(*pair, encoder).train for name, pair in tasks.items()}
    for split in (4, None):
        loader = MixedLoader(samples, {"digit": 3, "odd": 1}, 8, 5, Share(0, 1, split, lanes=1))
        batches, counts = iter(loader), {"digit": 0, "odd": 0}
        seen: dict[str, list[int]] = {"digit": [], "odd": []}
        for number in range(1, 13 * (8 // (split or 8))):
            for name, part in next(batches).parts.items():
                counts[name] += len(part)
                seen[name] += part.ids.tolist()
            assert counts["digit"] + counts["odd"] == number * (split or 8)
            assert counts["digit"] == 3 * counts["odd"]
        for name, loaded in loader.loaders.items():
            own = loaded.locate(np.arange(len(seen[name])))[1]
            assert seen[name] == samples[name].ids[own].tolist()


def test_shares_follow_the_sampling() -> None:
    sizes = {"a": 9000, "b": 1000}
    assert sampling_shares(sizes, "proportional") == {"a": 9, "b": 1}
    assert sampling_shares(sizes, "equal") == {"a": 1, "b": 1}
    assert sampling_shares(sizes, "temperature", 2.0) == {"a": 3, "b": 1}
    assert sampling_shares(sizes, "temperature", 1.0) == {"a": 9, "b": 1}
    assert sampling_shares({"a": 10**6, "b": 1}, "proportional") == {"a": 1000, "b": 1}


def test_bad_wishes_are_refused(export: Path, tasks: dict[str, Pair], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sampling 'even'"):
        multitask(export, tasks, sampling="even", report=_silent)
    with pytest.raises(UserError, match="give 1 or more"):
        multitask(export, tasks, sampling="temperature", temperature=0.5, report=_silent)
    with pytest.raises(UserError, match="names no task"):
        multitask(export, {"a/b": tasks["odd"]}, report=_silent)
    with pytest.raises(UserError, match="patience is for one task"):
        multitask(export, tasks, patience=3, report=_silent)
    with pytest.raises(UserError, match="does not exist"):
        multitask(export, {"odd": (tmp_path / "nowhere", None)}, output=tmp_path / "m", report=_silent)
    assert not list(tmp_path.iterdir())
