"""A time cap that is kept: what the next cell will cost, and a guard that stops one that costs more."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from finetune.advise.budgets import fitting
from finetune.job import steps_for
from finetune.samples import Ints, Samples
from finetune.settings import Settings
from finetune.train import TRIED

SAFETY = 1.25
"""An estimate counts as this much more: the machine may be busier than it was."""


class OutOfTime(Exception):
    """The time cap was reached in the middle of a cell."""


class Clock:
    """Counts down from the cap."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._end = now, now() + seconds

    def left(self) -> float:
        """Seconds until the cap, negative after it."""
        return self._end - self._now()

    def check(self) -> None:
        """Raises `OutOfTime` when the cap is reached."""
        if self.left() <= 0:
            raise OutOfTime


def guarded(samples: Samples, clock: Clock) -> Samples:
    """The same samples, which refuse to be read once the clock has run down: no step begins after the cap."""
    kind = type(samples)

    class Guarded(kind):  # type: ignore[misc, valid-type]
        def batch(self, positions: Ints, keys: Tensor) -> Any:
            clock.check()
            return super().batch(positions, keys)

    watched = copy.copy(samples)
    watched.__class__ = Guarded
    return watched


def work(labels: int, test_items: int, settings: Settings, candidates: int) -> float:
    """Samples that training on `labels` takes forward and back: learning-rate trials, the run itself, the test."""
    settings, trials = fitting(settings, labels), 0.0
    if settings.lr is None and candidates > 1:
        inner = max(1, min(labels, TRIED) * 3 // 4)
        trials = candidates * steps_for(inner, settings.trial) * settings.batch_size
    # Judging takes no backward pass, which is two thirds of a step.
    return trials + steps_for(labels, settings) * settings.batch_size + test_items / 3


class Costs:
    """Seconds of cells to come, from those that have run."""

    def __init__(self, size: Callable[[str, int], float]) -> None:
        """`size(arm, labels)` is a cell's work in some unit; seconds grow at most in proportion to it."""
        self._size, self._seen = size, dict[str, dict[int, list[float]]]()

    def note(self, arm: str, labels: int, seconds: float) -> None:
        """A cell took so long."""
        self._seen.setdefault(arm, {}).setdefault(labels, []).append(seconds)

    def predict(self, arm: str, labels: int) -> float | None:
        """Seconds that a cell will take at most, as far as can be known; None where its arm has not run."""
        seen = self._seen.get(arm)
        if not seen:
            return None
        size = self._size(arm, labels)
        nearest = min(seen, key=lambda ran: abs(self._size(arm, ran) - size))
        slowest = max(seen[nearest])
        return SAFETY * slowest * max(1.0, size / max(self._size(arm, nearest), 1e-9))
