"""One line that says how a run is going: rewritten in place on a terminal, now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from pretrain.pace import Pace


class ProgressLine:
    """Shows step, loss, speed, share of time spent waiting for data, and time left."""

    def __init__(
        self, total: int, batch_size: int, enabled: bool, every: float = 15.0, stream: TextIO | None = None
    ) -> None:
        """For `total` steps of `batch_size` samples.

        `every` is the number of seconds between two lines where `stream` (standard error) is no terminal.
        """
        self.total, self.batch_size, self.enabled = total, batch_size, enabled
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.every = 0.5 if self.terminal else every
        self._last = time.monotonic()
        self.alarm = False
        """Whether each line warns of a collapse."""
        self._open = False
        """Whether the cursor stands behind a line that the next one replaces."""

    def show(self, step: int, loss: float, pace: Pace) -> None:
        """Say where the run is, unless that was said a moment ago; the last step is always shown."""
        now = time.monotonic()
        if not self.enabled or (now - self._last < self.every and step < self.total):
            return
        seconds = (self.total - step) / pace.rate if pace.rate else 0.0
        left = f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"
        text = (
            f"step {step:,}/{self.total:,}  loss {loss:.4f}  {pace.rate * self.batch_size:,.0f} samples/s  "
            f"data wait {pace.waiting:.0%}  left {left}" + ("  COLLAPSED" if self.alarm else "")
        )
        self._write(f"\r{text}\033[K" if self.terminal else f"{text}\n")
        self._last, self._open = now, self.terminal

    def say(self, text: str) -> None:
        """A line of its own, below the progress; the wait for the next progress starts again."""
        if self.enabled:
            self.end()
            self._write(f"{text}\n")
            self._last = time.monotonic()

    def end(self) -> None:
        """Leave the line as it is and go on below."""
        if self._open:
            self._write("\n")
        self._open = False

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
