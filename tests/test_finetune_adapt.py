"""Adaptation starts where the export ended, is paired and resumed, and says what was forgotten."""

import json
from pathlib import Path

import pytest
from pretrain_kit import recipe
from test_finetune_kit import sentences as labelled
from test_finetune_kit import write_tsv
from test_finetune_targets import quantities

from data.errors import UserError
from finetune import adapt as room
from finetune.adapt import Plan, Target, adapt, recipe_for
from finetune.evaluation import evaluate
from finetune.run import finetune
from pretrain.export import read_about
from pretrain.loop import train
from pretrain.preemption import Preempted
from pretrain.run import read_metrics

QUICK = {"cpu": True, "min_steps": 6, "epochs": 1.0, "batch_size": 16, "lr": 1e-3}


def _silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def source(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a short MAE run."""
    settings = {"train.steps": 8, "data.validation": 0.05, "watch.knn_samples": 0, "watch.evaluate_samples": 64}
    return train(recipe("mae", digits / "train", settings), tmp_path_factory.mktemp("source") / "run")


def test_pictures_are_adapted_compared_and_resumed(
    source: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Target(str(digits / "train"), str(digits / "train"), str(digits / "test"), str(digits / "test"))
    plan = Plan("full", 5, (0, 1), steps=6)
    whole = adapt(source, target, plan, tmp_path / "whole", report=_silent, **QUICK)
    assert read_about(tmp_path / "whole/pretraining/export")["step"] == 6
    assert {"source_loss", "validation_loss"} <= set(whole["pretraining"]["before"])
    assert whole["pretraining"]["before"] != whole["pretraining"]["after"]
    assert whole["lead"]["difference"] == pytest.approx(whole["adapted"]["accuracy"] - whole["plain"]["accuracy"])
    # Each half is what `finetune` gives on its own.
    for name, encoder in (("plain", source), ("adapted", tmp_path / "whole/pretraining/export")):
        alone = finetune(
            encoder, target.train, target.test, strategy="full", labels_per_class=5, seeds=[1], report=_silent, **QUICK
        )
        assert whole[name]["runs"][1] == alone["accuracy"]
        model = tmp_path / "whole" / name / "seed1"
        assert evaluate(model, target.test, report=_silent, cpu=True)["accuracy"] == alone["accuracy"]

    # Stopped once in each part, it ends the same.
    def stopped(*_: object, **__: object) -> None:
        raise Preempted("SIGTERM")

    for name in ("pretrain", "finetune"):
        with monkeypatch.context() as patch:
            patch.setattr(room, name, stopped)
            with pytest.raises(Preempted):
                adapt(source, target, plan, tmp_path / "parts", report=_silent, **QUICK)
    parts = adapt(source, target, plan, tmp_path / "parts", report=_silent, **QUICK)
    assert {n: parts[n] for n in ("plain", "adapted", "lead")} == {n: whole[n] for n in ("plain", "adapted", "lead")}
    monkeypatch.setattr(room, "finetune", stopped)  # what is done is not done again
    assert adapt(source, target, plan, tmp_path / "parts", report=_silent, **QUICK)["lead"] == whole["lead"]
    with pytest.raises(UserError, match="another plan"):
        adapt(source, target, Plan("full", 5, (0, 1, 2), steps=6), tmp_path / "parts", report=_silent, **QUICK)


@pytest.mark.slow
def test_text_goes_on_with_its_own_objective(sentences: Path, tmp_path: Path) -> None:
    export = train(recipe("masked_language", sentences, {"train.steps": 8}), tmp_path / "run")
    data = write_tsv(tmp_path / "train.tsv", *labelled(40, 1)), write_tsv(tmp_path / "test.tsv", *labelled(60, 2))
    target = Target(str(sentences), str(data[0]), str(data[1]), str(sentences))
    plan = Plan("linear", None, (0,), lr_share=0.25, recipe=("train.batch_size=4",))
    results = adapt(export, target, plan, tmp_path / "out", report=_silent, cpu=True)
    used = results["pretraining"]["recipe"]
    assert (used["objective"]["name"], used["optimizer"]["lr"]) == ("masked_language", pytest.approx(5e-4))
    assert (used["train"]["steps"], used["train"]["batch_size"]) == (2, 4)
    losses = [line["source_loss"] for line in read_metrics(tmp_path / "out/pretraining") if "source_loss" in line]
    assert losses[-1] == pytest.approx(results["pretraining"]["after"]["source_loss"], abs=1e-5)
    assert json.loads((tmp_path / "out/results.json").read_text()) == results


def test_other_kinds_of_labels_are_compared_by_their_own_merit(source: Path, digits: Path, tmp_path: Path) -> None:
    (tmp_path / "ink").mkdir()
    data = [str(path) for path in quantities(tmp_path / "ink")]
    plan = Plan("linear", steps=2, seeds=(0, 1), task="regression")
    found = adapt(source, Target(str(digits / "train"), *data), plan, tmp_path / "out", report=_silent, cpu=True)
    assert found["merit"] == "r2"
    alone = finetune(source, *data, task="regression", strategy="linear", seeds=(0, 1), report=_silent, cpu=True)
    assert found["plain"]["r2"] == pytest.approx(alone["r2"])
    assert found["plain"]["interval"] == pytest.approx(alone["interval"])
    assert found["lead"]["difference"] == pytest.approx(found["adapted"]["r2"] - found["plain"]["r2"])


@pytest.mark.slow
def test_before_is_the_export_itself(source: Path, digits: Path, tmp_path: Path) -> None:
    """A continuation that changes nothing forgets and gains nothing."""
    target = Target(str(digits / "train"), str(digits / "train"), str(digits / "test"), str(digits / "test"))
    plan = Plan("linear", 5, (0, 1), lr_share=1e-12, steps=2, recipe=("optimizer.weight_decay=0",))
    results = adapt(source, target, plan, tmp_path / "out", report=_silent, cpu=True)
    assert results["pretraining"]["after"] == pytest.approx(results["pretraining"]["before"], rel=1e-4)
    assert abs(results["lead"]["difference"]) < 0.01


def test_all_is_done_in_the_precision_of_fine_tuning(source: Path, digits: Path) -> None:
    target = Target(str(digits / "train"), str(digits / "train"))
    own = read_about(source)["recipe"]["train"]["precision"]
    assert recipe_for(source, target, Plan()).train.precision == own
    assert recipe_for(source, target, Plan(), "bf16").train.precision == "bf16"
    assert recipe_for(source, target, Plan(recipe=("train.precision=no",)), "bf16").train.precision == "no"


def test_what_does_not_fit_is_said_before_anything_is_written(
    source: Path, digits: Path, sentences: Path, tmp_path: Path
) -> None:
    good = Target(str(digits / "train"), str(digits / "train"), str(digits / "test"))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="images"):
        adapt(source, Target(str(sentences), good.train), Plan(), out, report=_silent)
    with pytest.raises(UserError, match="positive share"):
        adapt(source, good, Plan(lr_share=0), out, report=_silent)
    with pytest.raises(UserError, match="train"):
        adapt(source, good, Plan(recipe=("train.stepz=3",)), out, report=_silent)
    with pytest.raises(UserError, match="no strategy"):
        adapt(source, good, Plan("fulll"), out, report=_silent)
    with pytest.raises(UserError, match="no headwater export"):
        recipe_for(tmp_path, good, Plan())
    with pytest.raises(UserError, match="computes with precision=no already"):
        adapt(source, good, Plan(recipe=("train.precision=bf16",)), out, report=_silent, precision="no")
    assert not out.exists()
