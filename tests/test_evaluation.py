"""Measures equal hand-computed and scikit-learn's values; a temperature is fitted on other data than the test's."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import brier_score_loss, f1_score, log_loss
from test_finetune_kit import sentences, write_tsv

from data.errors import UserError
from finetune.calibration import (
    adaptive_calibration_error,
    bin_numbers,
    expected_calibration_error,
    fit_temperature,
    log_losses,
    squared_errors,
)
from finetune.classified import Classified, class_table, confusion, intervals, measure
from finetune.diagrams import draw_confusion
from finetune.evaluation import evaluate
from finetune.model import load_model
from finetune.run import finetune
from finetune.tasks import load_test

pytest_plugins = ["test_finetune_kit"]


def _silent(_: str) -> None:
    pass


def _drawn(items: int, classes: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax at temperature `sharpness` is exactly how the labels were drawn."""
    draw = np.random.Generator(np.random.Philox(seed))
    logits = draw.normal(size=(items, classes))
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([draw.choice(classes, p=row) for row in truth])
    return logits * sharpness, labels


def _softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).softmax(dim=1).numpy()


def test_calibration_errors_by_hand() -> None:
    # Five bins of width 0.2: {0.15}, {0.5, 0.6}, {0.95, 1.0}; a bin holds its upper end.
    confidence = np.array([0.15, 0.5, 0.6, 0.95, 1.0])
    correct = np.array([True, False, True, True, False])
    assert bin_numbers(confidence, 5).tolist() == [0, 2, 2, 4, 4]
    by_hand = (abs(1 - 0.15) + abs(1 - 1.1) + abs(1 - 1.95)) / 5
    assert expected_calibration_error(confidence, correct, 5) == pytest.approx(by_hand)
    # Two bins of equal counts, three and two items.
    assert adaptive_calibration_error(confidence, correct, 2) == pytest.approx((abs(2 - 1.25) + abs(1 - 1.95)) / 5)
    assert expected_calibration_error(np.ones(4), np.ones(4, dtype=bool)) == 0
    assert adaptive_calibration_error(np.ones(4), np.zeros(4, dtype=bool)) == 1


def test_scores_equal_those_of_scikit_learn() -> None:
    logits, labels = _drawn(400, 5, 2.0)
    probabilities = _softmax(logits)
    found = measure(Classified.of(probabilities, labels))
    assert squared_errors(np.array([[0.7, 0.2, 0.1]]), np.array([1])) == pytest.approx(0.49 + 0.64 + 0.01)
    assert found["brier_score"] == pytest.approx(brier_score_loss(labels, probabilities, scale_by_half=False))
    assert found["log_loss"] == pytest.approx(log_loss(labels, probabilities))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, probabilities.argmax(1), average="macro"))
    assert np.isfinite(log_losses(np.array([[1.0, 0.0]]), np.array([1]))).all()


def test_a_temperature_undoes_what_was_multiplied() -> None:
    logits, labels = _drawn(20_000, 4, 3.0)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(3.0, rel=0.03)
    before, after = (measure(Classified.of(_softmax(logits / t), labels)) for t in (1.0, temperature))
    assert after["expected_calibration_error"] < 0.02 < 0.1 < before["expected_calibration_error"]
    assert after["accuracy"] == before["accuracy"]
    # No other temperature does better; classes without a vote are no obstacle.
    for other in (temperature * 0.97, temperature * 1.03):
        assert measure(Classified.of(_softmax(logits / other), labels))["log_loss"] > after["log_loss"]
    silent = np.concatenate([logits, np.full((len(logits), 1), -np.inf)], axis=1)
    assert fit_temperature(silent, labels) == pytest.approx(temperature)
    assert fit_temperature(np.full((3, 2), -np.inf), np.zeros(3, dtype=np.int64)) == 1.0


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    inside = 0
    for seed in range(40):
        logits, labels = _drawn(150, 3, 1.0, seed)
        low, high = intervals(Classified.of(_softmax(logits), labels), 200)["brier_score"]
        # The expected Brier score of perfectly calibrated probabilities over the same distribution.
        inside += low <= TRUE_BRIER <= high
    assert 32 <= inside <= 40


TRUE_BRIER = float(
    (1 - (_softmax(np.random.Generator(np.random.Philox(99)).normal(size=(200_000, 3))) ** 2).sum(axis=1)).mean()
)


def test_the_table_and_the_matrix() -> None:
    judged = Classified.of(np.eye(3)[[0, 0, 1, 1]], np.array([0, 1, 1, 1]))
    matrix = confusion(judged, 3)
    assert matrix.tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    first, second, third = class_table(matrix, ["a", "b", "c"])
    assert (first["precision"], first["recall"], first["f1"]) == (0.5, 1.0, pytest.approx(2 / 3))
    assert (second["precision"], second["recall"], second["items"]) == (1.0, pytest.approx(2 / 3), 3)
    assert (third["precision"], third["recall"], third["f1"]) == (None, None, None)


@pytest.mark.parametrize("count", [2, 10, 100])
def test_confusion_matrices_can_be_read(count: int, tmp_path: Path) -> None:
    matrix = np.arange(count * count).reshape(count, count)
    draw_confusion(matrix, [f"$odd_{i} {'long ' * 9}" for i in range(count)], tmp_path / "c.png")
    width, height = Image.open(tmp_path / "c.png").size
    assert 300 < width < 2600
    assert 300 < height < 2600


def test_evaluate_writes_what_it_found_and_saves_a_temperature(
    text_export: Path, sentiment: tuple[Path, Path], tmp_path: Path
) -> None:
    train, test = sentiment
    finetune(text_export, train, test, output=tmp_path / "m", report=_silent, cpu=True)
    other = write_tsv(tmp_path / "other.tsv", *sentences(200, 5))
    with pytest.raises(UserError, match="is the test set"):
        evaluate(tmp_path / "m", test, calibrate=test, report=_silent)
    with pytest.raises(UserError, match="already exists"):
        evaluate(tmp_path / "m", test, output=tmp_path / "m", report=_silent)
    assert load_model(tmp_path / "m").temperature == 1.0
    plain = evaluate(tmp_path / "m", test, report=_silent)
    results = evaluate(tmp_path / "m", test, calibrate=other, output=tmp_path / "out", report=_silent)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "confusion.png",
        "items.csv",
        "reliability.png",
        "results.json",
    ]
    with open(tmp_path / "out" / "items.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["item"] for row in rows] == sentences(120, 2)[0]
    assert np.mean([int(row["correct"]) for row in rows]) == results["accuracy"] == plain["accuracy"]
    # Fitted on the other data, kept with the model, and felt by everything that asks it afterwards.
    model = load_model(tmp_path / "m")
    assert model.temperature == results["temperature"] != 1.0
    assert results["calibration"]["after"]["log_loss"] < results["calibration"]["before"]["log_loss"]
    samples, _ = load_test(test, model.encoder, model.classes)
    cooled = model.probabilities(samples)
    model.temperature = 1.0
    plain_again = model.probabilities(samples)
    expected = (plain_again.double().log() / results["temperature"]).softmax(dim=1).float()
    torch.testing.assert_close(cooled, expected, rtol=1e-4, atol=1e-5)
    model.save(tmp_path / "again")
    assert load_model(tmp_path / "again").temperature == 1.0
