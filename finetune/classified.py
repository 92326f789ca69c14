"""What a classifier says about labelled items: measures with intervals, the table of classes, the confusion matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from finetune.calibration import (
    adaptive_calibration_error,
    expected_calibration_error,
    log_losses,
    squared_errors,
)
from finetune.evidence import macro_f1, wilson

Ints = NDArray[np.int64]
RESAMPLES = 1000
"""Bootstrap samples behind an interval."""


@dataclass(frozen=True)
class Classified:
    """What a model said about `n` items, and what is true."""

    labels: Ints
    """(n,) true classes."""
    predictions: Ints
    """(n,) likeliest classes; the first of equal probabilities."""
    confidence: NDArray[np.float64]
    """(n,) their probabilities."""
    own: NDArray[np.float64]
    """(n,) the true classes' probabilities."""
    squared: NDArray[np.float64]
    """(n,) Brier scores."""
    log_loss: NDArray[np.float64]
    """(n,) in nats."""

    @classmethod
    def of(cls, probabilities: NDArray[np.floating], labels: Ints) -> Self:
        """From probabilities (n, classes) and labels (n,)."""
        predictions = probabilities.argmax(axis=1).astype(np.int64)
        rows = np.arange(len(labels))
        return cls(
            labels=labels,
            predictions=predictions,
            confidence=probabilities[rows, predictions].astype(np.float64),
            own=probabilities[rows, labels].astype(np.float64),
            squared=squared_errors(probabilities, labels),
            log_loss=log_losses(probabilities, labels),
        )

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(n,) whether each prediction is right."""
        return self.predictions == self.labels

    def select(self, rows: Ints) -> Classified:
        """The items `rows`, repeated where a row is."""
        return Classified(
            labels=self.labels[rows],
            predictions=self.predictions[rows],
            confidence=self.confidence[rows],
            own=self.own[rows],
            squared=self.squared[rows],
            log_loss=self.log_loss[rows],
        )


MEASURES: dict[str, Callable[[Classified], float]] = {
    "accuracy": lambda judged: float(judged.correct.mean()),
    "macro_f1": lambda judged: macro_f1(judged.predictions, judged.labels),
    "expected_calibration_error": lambda judged: expected_calibration_error(judged.confidence, judged.correct),
    "adaptive_calibration_error": lambda judged: adaptive_calibration_error(judged.confidence, judged.correct),
    "brier_score": lambda judged: float(judged.squared.mean()),
    "log_loss": lambda judged: float(judged.log_loss.mean()),
}


def measure(judged: Classified) -> dict[str, float]:
    """Every measure of `MEASURES`."""
    return {name: of(judged) for name, of in MEASURES.items()}


def intervals(judged: Classified, resamples: int = RESAMPLES) -> dict[str, list[float]]:
    """95 % intervals over test items: Wilson's for the accuracy, percentiles of a bootstrap for the others.

    A calibration error cannot be negative and its bootstrap is biased upwards (resampling adds noise to every
    bin), so its interval is read as "no better than the lower end" rather than as centred on the estimate.
    """
    count = len(judged.labels)
    others = [name for name in MEASURES if name != "accuracy"]
    found = np.empty((resamples, len(others)))
    # Raw bits of a fixed Philox stream: the same numbers under every version of NumPy.
    stream = np.random.Philox(key=1)
    for row in range(resamples):
        drawn = judged.select((stream.random_raw(count) % np.uint64(count)).astype(np.int64))
        found[row] = [MEASURES[name](drawn) for name in others]
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    bounds = {name: [float(low[i]), float(high[i])] for i, name in enumerate(others)}
    return {"accuracy": list(wilson(int(judged.correct.sum()), count))} | bounds


def confusion(judged: Classified, classes: int) -> Ints:
    """int64 (classes, classes): items of the class of the row that were predicted as that of the column."""
    pairs = judged.labels * classes + judged.predictions
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes).astype(np.int64)


def class_table(matrix: Ints, classes: list[str]) -> list[dict[str, Any]]:
    """Of each class its items, predictions, precision, recall and F1; None where nothing is divided by nothing."""
    hits, present, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
    return [
        {
            "class": name,
            "items": int(present[i]),
            "predicted": int(predicted[i]),
            "precision": _share(hits[i], predicted[i]),
            "recall": _share(hits[i], present[i]),
            "f1": _share(2 * hits[i], predicted[i] + present[i]),
        }
        for i, name in enumerate(classes)
    ]


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None
