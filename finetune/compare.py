"""Models beside each other on the same items: accuracy, calibration, and differences with paired intervals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.calibration import expected_calibration_error, log_losses
from finetune.evidence import Score, score
from finetune.samples import Ints

Correct = NDArray[np.bool_]


@dataclass(frozen=True)
class Judged:
    """What a model said about labelled items."""

    name: str
    probabilities: NDArray[np.float32]
    """(n, classes), rows sum to 1."""
    labels: Ints
    """(n,) true classes."""

    @cached_property
    def score(self) -> Score:
        """Accuracy with its interval, and macro-F1."""
        return score(self.probabilities, self.labels)

    @property
    def log_loss(self) -> float:
        """Mean negative log probability of the true class, in nats."""
        return float(log_losses(self.probabilities, self.labels).mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al. 2017)."""
        confidence = self.probabilities.max(axis=1).astype(np.float64)
        return expected_calibration_error(confidence, self.score.correct)

    def entry(self) -> dict[str, Any]:
        """A line of the results."""
        return {
            "name": self.name,
            "accuracy": self.score.accuracy,
            "interval": list(self.score.interval),
            "macro_f1": self.score.macro_f1,
            "log_loss": self.log_loss,
            "calibration_error": self.calibration_error,
        }


def beside(judged: Judged, references: list[Judged]) -> dict[str, Any]:
    """`judged`'s entry, with its lead over each of `references` on the same items."""
    leads = [{"over": other.name} | lead(judged.score.correct[None], other.score.correct[None]) for other in references]
    return judged.entry() | {"leads": leads}


def lead(correct: Correct, reference: Correct, resamples: int = 2000) -> dict[str, Any]:
    """How much more often one is right than the other, on the same items: the mean and its paired 95 % interval.

    Both are (seeds, items). Items are drawn with replacement, the same for both; so are seeds where there are
    several, in pairs. One seed's interval therefore covers the chance in the items alone.
    """
    difference = correct.astype(np.float64) - reference.astype(np.float64)
    seeds, items = difference.shape
    # Raw bits of a fixed Philox stream: the same numbers under every version of NumPy.
    stream = np.random.Philox(key=1)
    means = np.empty(resamples)
    for number in range(resamples):
        bits = stream.random_raw(seeds + items)
        rows = difference if seeds == 1 else difference[bits[:seeds] % np.uint64(seeds)]
        means[number] = rows.mean(axis=0)[bits[seeds:] % np.uint64(items)].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return {"difference": float(difference.mean()), "interval": [float(low), float(high)]}


def percent(interval: list[float]) -> str:
    """An interval of a share in words."""
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def table(entries: list[dict[str, Any]]) -> str:
    """Aligned lines: accuracy in per cent, log loss, calibration error; `leads` below the one that has them."""
    width = max(len(entry["name"]) for entry in entries)
    lines = [f"{'':<{width}}  accuracy (95 % interval)  log loss  calibration error"]
    for entry in entries:
        low, high = entry["interval"]
        accuracy = f"{100 * entry['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        lines.append(
            f"{entry['name']:<{width}}  {accuracy:<24}  {entry['log_loss']:<8.3f}  {entry['calibration_error']:.3f}"
        )
    for entry in entries:
        for each in entry.get("leads", []):
            difference = f"{100 * each['difference']:+.1f} ({percent(each['interval'])})"
            lines.append(f"{entry['name']} over {each['over']}: {difference} points, paired")
    return "\n".join(lines)
