"""How fast a run goes now: over its most recent steps, without evaluations and checkpoints between them."""

from __future__ import annotations

from collections import deque

WINDOW = 50
"""Steps looked back on."""


class Pace:
    """Seconds of the last steps, and how many of them went into waiting for data."""

    def __init__(self, window: int = WINDOW) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)

    def add(self, seconds: float, waited: float) -> None:
        """Note one step that took `seconds`, of which it `waited` some for data."""
        self._steps.append((seconds, waited))

    @property
    def rate(self) -> float:
        """Steps a second; 0 before the first."""
        spent = self._spent
        return len(self._steps) / spent if spent else 0.0

    @property
    def waiting(self) -> float:
        """Share of the time spent waiting for data."""
        spent = self._spent
        return sum(waited for _, waited in self._steps) / spent if spent else 0.0

    @property
    def _spent(self) -> float:
        return sum(seconds for seconds, _ in self._steps)
