"""Ensembles, soups and interpolation of every kind of task: what must be equal is equal, whatever is averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_finetune_kit import write_encoder, write_text_encoder
from test_finetune_targets import KINDS, Make, masks, quantities, tags

from data.errors import UserError
from finetune import alignment
from finetune.blend import blend
from finetune.compare import JudgedTarget
from finetune.ensemble import Ensemble, ensemble, load_any
from finetune.evaluation import evaluate
from finetune.interpolate import interpolate
from finetune.labelled_data import LabelledData
from finetune.leads import lead, merit_lead
from finetune.members import Member
from finetune.mixture_weights import least_squares_weights, thinned
from finetune.model import load_model
from finetune.predict import stream
from finetune.run import finetune
from finetune.settings import Settings
from finetune.soup import soup
from finetune.targets import IGNORED
from finetune.targets_class import Classification
from finetune.tasks import load_test
from launch.cli import main

pytest_plugins = ["test_finetune_kit"]


def _silent(_: str) -> None:
    pass


def _models(source: Path, make: Make, task: str, root: Path) -> tuple[list[Path], Path]:
    """Two linear models that one encoder's features end in, of other penalties, and the test set."""
    train, test = make(root)
    members = [root / "a", root / "b"]
    for member, strength in zip(members, (1.0, 0.01), strict=True):
        finetune(source, train, test, task=task, output=member, strength=strength, report=_silent, cpu=True)
    return members, test


def _mean_scores(members: list[Path], weights: list[float], test: Path) -> dict[str, float]:
    """Of the members' mean, from the definition."""
    decided, truths, first = [], [], load_model(members[0])
    samples, _ = load_test(test, first.encoder, first.target)
    for positions, batch in samples.batches(50):
        total = torch.zeros(())
        for weight, member in zip(weights, members, strict=True):
            model = load_model(member)
            with torch.no_grad():
                outputs = model.head(model.encoder(batch, dense=model.target.dense))
            total = total + weight * model.target.distribution(outputs).double()
        decided += list(first.target.decision(total.float()))
        truths += list(samples.truth(positions))
    return first.target.score(decided, truths)


def _rows(found: Any) -> list[dict[str, Any]]:
    return [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items()} for row in found]


@pytest.mark.parametrize(("task", "kind", "make"), KINDS)
def test_an_ensemble_says_its_members_mean(
    task: str, kind: str, make: Make, export: Path, text_export: Path, tmp_path: Path
) -> None:
    members, test = _models(export if kind == "images" else text_export, make, task, tmp_path)
    results = ensemble(members, test, weights=[1, 3], output=tmp_path / "e", report=_silent, cpu=True)
    merit, entries = results["merit"], results["test"]["models"]
    assert results["task"] == task
    for member, entry in zip(members, entries, strict=False):
        alone = evaluate(member, test, report=_silent, cpu=True)
        assert {name: entry[name] for name in alone["scores"]} == pytest.approx(alone["scores"])
        assert entry["interval"] == alone["interval"]
    expected = _mean_scores(members, [0.25, 0.75], test)
    assert {name: entries[-1][name] for name in expected} == pytest.approx(expected)
    saved = evaluate(tmp_path / "e", test, output=tmp_path / "judged", report=_silent, cpu=True)
    assert saved["scores"] == pytest.approx(expected)
    assert (tmp_path / "judged" / "items.csv").is_file()
    leads = entries[-1]["leads"]
    assert leads[0]["difference"] == pytest.approx(entries[-1][merit] - entries[0][merit])
    assert leads[0]["interval"][0] <= leads[0]["difference"] <= leads[0]["interval"][1]
    # Written, read again and asked about new files it says the same; so does one of equals as its only member.
    made = Ensemble([Member(str(each), load_model(each)) for each in members], [0.25, 0.75])
    inputs: list[str | Path] = [*sorted(tmp_path.glob("test/**/*.png"))[:5]] or ["a good film", "the awful fine thing"]
    again = _rows(stream(load_any(tmp_path / "e"), inputs, cpu=True))
    assert again == _rows(stream(made, inputs, cpu=True))
    assert len(again) == len(inputs)
    alike = Ensemble([made.members[0]] * 3, [1 / 3] * 3)
    ours, theirs = (_rows(stream(each, inputs, cpu=True)) for each in (alike, made.members[0].model))
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    assert ours == theirs or task in ("regression", "multi-label")  # whose numbers have roundings of their own


@pytest.mark.parametrize(("task", "kind", "make"), KINDS)
def test_a_soup_of_equals_and_the_ends_of_a_way_are_the_models_themselves(
    task: str, kind: str, make: Make, export: Path, text_export: Path, tmp_path: Path
) -> None:
    members, test = _models(export if kind == "images" else text_export, make, task, tmp_path)
    judged = [evaluate(member, test, report=_silent, cpu=True) for member in members]
    merit = judged[0]["merit"]
    found = soup([members[0]] * 2, test, output=tmp_path / "s", report=_silent, cpu=True)
    assert found["validation"][f"uniform_{merit}"] == found["validation"][f"greedy_{merit}"] == judged[0][merit]
    assert evaluate(tmp_path / "s", test, report=_silent, cpu=True)["scores"] == judged[0]["scores"]
    better = soup(members, test, report=_silent, cpu=True)["validation"]
    assert better[f"greedy_{merit}"] >= max(each[merit] for each in judged)
    way = interpolate(*members, validation=test, steps=3, report=_silent, cpu=True)
    assert [way["curve"][place]["validation"] for place in (0, -1)] == [each[merit] for each in judged]
    assert way["merit"] == merit
    best = max(way["curve"], key=lambda point: point["validation"])
    assert (
        way["curve"][[point["alpha"] for point in way["curve"]].index(way["alpha"])]["validation"]
        == (best["validation"])
    )


@pytest.mark.parametrize(("task", "kind", "make"), KINDS)
def test_chosen_weights_fit_better_than_equal_ones(
    task: str, kind: str, make: Make, export: Path, text_export: Path, tmp_path: Path
) -> None:
    members, test = _models(export if kind == "images" else text_export, make, task, tmp_path)
    chosen = ensemble(members, validation=test, output=tmp_path / "e", report=_silent, cpu=True)
    weights = [member["weight"] for member in chosen["members"]]
    assert sum(weights) == pytest.approx(1)
    voices = [Member(str(member), load_model(member)) for member in members]
    data = LabelledData(test, voices[0].model, _silent)
    losses = {
        shares: data.judge_all(voices, Settings(cpu=True), shares)[-1].loss
        for shares in [tuple(weights), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]
    }
    assert losses[tuple(weights)] <= min(losses.values()) + 1e-6


def test_least_squares_weights_are_the_best_on_the_simplex() -> None:
    draw = np.random.Generator(np.random.Philox(1))
    errors = draw.normal(size=(300, 3)) * [1.0, 1.5, 3.0] + draw.normal(size=(300, 1))
    weights = np.array(least_squares_weights(errors))
    assert weights.min() >= 0
    assert weights.sum() == pytest.approx(1)
    others = draw.dirichlet([1, 1, 1], 4000)
    assert ((errors @ weights) ** 2).mean() <= ((errors @ others.T) ** 2).mean(axis=0).min()
    assert least_squares_weights(np.zeros((5, 2))) != []


def test_a_thinned_truth_is_a_fixed_choice_of_each_item() -> None:
    truth = torch.arange(2 * 40).view(2, 5, 8) % 3
    truth[0, 0] = IGNORED
    few = thinned(truth, np.array([7, 9]), 6)
    assert (few != IGNORED).flatten(1).sum(dim=1).tolist() == [6, 6]
    assert torch.equal(few[few != IGNORED], truth[few != IGNORED])
    assert torch.equal(thinned(truth[1:], np.array([9]), 6), few[1:])
    assert torch.equal(thinned(truth, np.array([7, 9]), 40), truth)


def test_a_lead_of_merits_is_that_of_correct_answers() -> None:
    draw = np.random.Generator(np.random.Philox(2))
    correct, reference = draw.random((2, 50)) < 0.7, draw.random((2, 50)) < 0.5
    sums = [np.stack([each, np.ones_like(each)], axis=-1).astype(float) for each in (correct, reference)]
    expected, found = lead(correct, reference), merit_lead(Classification(["a", "b"]), sums[0], sums[1])
    assert found["difference"] == pytest.approx(expected["difference"])
    assert found["interval"] == pytest.approx(expected["interval"])
    same = JudgedTarget("same", Classification(["a", "b"]), sums[0][0], {"accuracy": 0.7}, 0.0)
    assert JudgedTarget.lead([same], [same]) == {"difference": 0.0, "interval": [0.0, 0.0]}


def test_quantities_of_other_units_are_averaged_as_they_are(export: Path, tmp_path: Path) -> None:
    train, test = quantities(tmp_path)
    for name, data in (("a", train), ("b", test)):
        finetune(export, data, test, task="regression", strength=1.0, output=tmp_path / name, report=_silent, cpu=True)
    one, two = load_model(tmp_path / "a"), load_model(tmp_path / "b")
    assert one.target.mean != two.target.mean  # type: ignore[attr-defined]
    samples, _ = load_test(test, one.encoder, one.target)
    features = one.encoder(samples.batch(np.arange(9), samples.keys(0, 0, np.arange(9)))).detach()
    said = [model.from_features(features) for model in (one, two)]
    # The encoder is the same, so the average of weights computes the average of values.
    torch.testing.assert_close(blend(one, two, 0.25).from_features(features), 0.75 * said[0] + 0.25 * said[1])
    assert torch.equal(blend(one, two, 0.0).from_features(features), said[0])
    assert torch.equal(blend(one, two, 1.0).from_features(features), said[1])


def test_words_are_brought_together_where_tokenizers_cut_texts_differently(text_export: Path, tmp_path: Path) -> None:
    train, test = tags(tmp_path)
    long = " ".join(text for text in test.read_text().split() if not text.isupper() and "-" not in text).split()[:60]
    test.write_text(test.read_text() + "\n" + "".join(f"{word}\tO\n" for word in long))
    other = write_text_encoder(tmp_path / "other", seed=3, vocabulary=280)
    for name, source in (("a", text_export), ("b", other)):
        finetune(source, train, test, task="tokens", strength=1.0, output=tmp_path / name, report=_silent, cpu=True)
    members = [tmp_path / "a", tmp_path / "b"]
    rows = [len(load_test(test, model.encoder, model.target)[0]) for model in map(load_model, members)]
    assert rows[0] != rows[1]
    # Members that are nearly alone say what they say alone: the other's words are where they should be.
    alone = [evaluate(member, test, report=_silent, cpu=True)["token_accuracy"] for member in members]
    for number in range(2):
        weights = [1 - number, number]
        entries = ensemble(members, test, weights=weights, report=_silent, cpu=True)["test"]["models"]
        assert entries[-1]["token_accuracy"] == entries[number]["token_accuracy"] == pytest.approx(alone[number])
    both = Ensemble([Member(str(each), load_model(each)) for each in members], [0.5, 0.5])
    texts = ["a good film", " ".join(long), " "]
    row = _rows(stream(both, texts, cpu=True))
    assert [each["words"] for each in row] == [text.split() for text in texts]
    judged = evaluate(both, test, output=tmp_path / "out", report=_silent, cpu=True)
    assert judged["f1"] > 0.5


def test_pixels_are_judged_at_the_first_members_size(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = masks(tmp_path)
    large = write_encoder(tmp_path / "large", seed=2, img_size=24, patch_size=6)
    for path in (large / "config.json", large / "headwater" / "export.json"):
        described = json.loads(path.read_text())
        if "pretrained_cfg" in described:
            described["pretrained_cfg"]["input_size"] = [3, 24, 24]
        else:
            described["image_size"] = 24
        path.write_text(json.dumps(described))
    for name, source in (("a", export), ("b", large)):
        options: dict[str, Any] = {"task": "segmentation", "strength": 1.0, "report": _silent, "cpu": True}
        finetune(source, train, test, output=tmp_path / name, **options)
    members = [tmp_path / "a", tmp_path / "b"]
    assert [load_model(member).target.size for member in members] == [16, 24]  # type: ignore[attr-defined]
    for order in (members, members[::-1]):
        found = ensemble(order, test, output=tmp_path / "e", overwrite=True, report=_silent, cpu=True)
        ours, first = found["test"]["models"][-1], found["test"]["models"][0]
        assert first["miou"] == evaluate(order[0], test, report=_silent, cpu=True)["miou"]
        assert ours["miou"] > 0.5
        rows = _rows(stream(load_any(tmp_path / "e"), [test / "images"], cpu=True))
        assert np.array(rows[0]["mask"]).shape == (16, 16)
        with monkeypatch.context() as patch:  # seven pictures a batch, for the sake of memory
            patch.setattr(alignment, "NUMBERS", 7 * 24 * 24 * 2)
            assert _rows(stream(load_any(tmp_path / "e"), [test / "images"], cpu=True)) == rows
            again = evaluate(tmp_path / "e", test, report=_silent, cpu=True)
            assert again["miou"] == pytest.approx(ours["miou"], abs=1e-3)
    with pytest.raises(UserError, match="built or fed differently"):
        soup(members, test, report=_silent, cpu=True)


def test_kinds_and_names_are_not_mixed(export: Path, tmp_path: Path) -> None:
    train, test = quantities(tmp_path)
    named = tmp_path / "named.jsonl"
    rows = [line.split(",") for line in train.read_text().splitlines()[1:]]
    named.write_text("\n".join(json.dumps({"file": file, "value": {"ink": float(ink)}}) for file, ink in rows))
    labelled = tmp_path / "labelled.csv"
    labelled.write_text(
        "file,labels\n" + "\n".join(f"{file},{'dark' if i % 2 else 'light'}" for i, (file, _) in enumerate(rows))
    )
    options: dict[str, Any] = {"report": _silent, "cpu": True}
    finetune(export, train, test, task="regression", strength=1.0, output=tmp_path / "value", **options)
    finetune(export, named, task="regression", strength=1.0, output=tmp_path / "ink", **options)
    finetune(export, labelled, task="multi-label", strength=1.0, output=tmp_path / "labels", **options)
    finetune(
        export, train, test, task="regression", strategy="frozen", output=tmp_path / "mlp", lr=1e-3, hidden=8, **options
    )
    with pytest.raises(UserError, match=r"is for regression and .* for multi-label; combine models of one"):
        ensemble([tmp_path / "value", tmp_path / "labels"], test, report=_silent)
    with pytest.raises(UserError, match=r"predict other quantities \('ink', 'value'\)"):
        soup([tmp_path / "value", tmp_path / "ink"], test, report=_silent)
    with pytest.raises(UserError, match="hidden layer"):
        interpolate(tmp_path / "value", tmp_path / "mlp", test, report=_silent)
    # What training held out is what is chosen on.
    said: list[str] = []
    found = soup([tmp_path / "ink"], named, report=said.append, cpu=True)
    assert found["validation"]["samples"] == 30
    assert found["validation"]["greedy_r2"] == json.loads((tmp_path / "ink/results.json").read_text())["r2"]
    assert any("held out" in line for line in said)


def test_the_commands_name_the_merit(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (a, b), test = _models(export, quantities, "regression", tmp_path)
    assert main(["ensemble", str(a), str(b), "--test", str(test)]) == 0
    printed = capsys.readouterr().out
    assert "R² (95 % interval)" in printed
    assert "squared error" in printed
    assert f"ensemble over {a}: " in printed
    assert "points" not in printed
    assert main(["soup", str(a), str(b), "--validation", str(test)]) == 0
    assert "R² 0." in capsys.readouterr().out
    plot = tmp_path / "way.png"
    words = ["interpolate", str(a), str(b), "--test", str(test), "--shifted", str(test), "--plot", str(plot)]
    assert main([*words, "--steps", "3"]) == 0
    assert "test: R² 0." in capsys.readouterr().out
    assert plot.stat().st_size > 10_000
