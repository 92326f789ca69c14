"""One line that says how a run is going: rewritten in place on a terminal, now and then elsewhere."""

from __future__ import annotations

import sys
import time


class ProgressLine:
    """Shows step, loss, speed, share of time spent waiting for data, and time left."""

    def __init__(self, total: int, enabled: bool, every: float = 15.0) -> None:
        self.total, self.enabled = total, enabled
        self.every = 0.5 if sys.stderr.isatty() else every
        self._last = 0.0
        self._shown = False

    def show(self, step: int, loss: float, rate: float, waiting: float, eta: float) -> None:
        """Args: `rate` in samples a second, `waiting` a share of the time, `eta` in seconds."""
        now = time.monotonic()
        if not self.enabled or (now - self._last < self.every and step < self.total):
            return
        self._last, self._shown = now, True
        left = f"{int(eta // 3600)}:{int(eta // 60 % 60):02d}:{int(eta % 60):02d}"
        text = (
            f"step {step:,}/{self.total:,}  loss {loss:.4f}  {rate:,.0f} samples/s  "
            f"data wait {waiting:.0%}  left {left}"
        )
        print(
            f"\r{text}\033[K" if sys.stderr.isatty() else text,
            file=sys.stderr,
            end="" if self._tty else "\n",
            flush=True,
        )

    def say(self, text: str) -> None:
        """A line of its own, below the progress."""
        if self.enabled:
            self.end()
            print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line as it is and go on below."""
        if self._shown and self._tty:
            print(file=sys.stderr)
        self._shown = False

    @property
    def _tty(self) -> bool:
        return sys.stderr.isatty()
