"""Being told to stop: by a signal, by a file, or by the clock. Only a flag, until all processes agree."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from pretrain.clock import process_age
from pretrain.exits import REQUEUE

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REASONS = (*(each.name for each in SIGNALS), "STOP file", "max_time")
"""Why a run may be asked to stop; one vote each rides on the reduction that every step makes anyway."""
ECHO_SECONDS = 5.0
"""Under a launcher, which passes on what it gets, a signal this soon after the first one is the same request."""
_LOOK_SECONDS = 0.5
"""Between two looks for the STOP file."""
_EXIT_SECONDS = 5.0
"""Kept free before `max_time` for leaving, beyond what a save and a step take."""


class Preempted(BaseException):
    """The run stops because it was asked to; what it has done is saved. Unlike errors, nobody catches it on the way."""

    def __init__(self, reason: str, agreed: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.agreed = agreed
        """Whether all processes stop at the same step; else this one left alone, before there was any."""

    @property
    def status(self) -> int:
        """The exit status: 75 asks a scheduler to start the command again; 0 after a STOP file, which does not.

        Under torchrun and `accelerate launch` 0 as well: they would take anything else for a failure, report
        it with a traceback, and start the workers again; status.json says `preempted`.
        """
        return 0 if self.agreed and (self.reason == "STOP file" or launched()) else REQUEUE


class Preemption:
    """Whether this process has been asked to stop, and the votes by which all processes come to agree."""

    def __init__(self, stop: Path | None, limit: float | None = None, main: bool = True) -> None:
        """For a run that stops when the file `stop` exists, or `limit` seconds after its launcher started.

        Only the `main` process looks at the file and at the clock; each hears its own signals.
        """
        self.stop, self.limit, self.main = stop, limit, main
        self.save_seconds = 0.0
        """The longest that a save has taken, or may take as far as one knows."""
        self.started = False
        """Whether there is progress to save; before that, a signal ends the run where it stands."""
        self._age = process_age(os.getppid() if launched() else os.getpid()) - time.monotonic()
        self._signal: str | None = None
        self._signalled = self._looked = 0.0
        self._polls: deque[float] = deque(maxlen=100)
        self._stop_seen = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests to stop inside the block, and as before behind it."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hears signals in the main thread only
            return
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def asked(self) -> str | None:
        """Why this process has been asked to stop, or None; cheap enough for every microbatch."""
        now = time.monotonic()
        self._polls.append(now)
        if self._signal is not None:
            return self._signal
        if self.main and self._found(now):
            return "STOP file"
        return "max_time" if self.main and self._late(now) else None

    def votes(self, device: torch.device) -> Tensor:
        """float64 (4,): a one where this process has been asked to stop for that one of `REASONS`."""
        asked = self.asked()
        return torch.tensor([float(reason == asked) for reason in REASONS], dtype=torch.float64, device=device)

    def agreed(self, accelerator: Accelerator) -> str | None:
        """The same answer on all processes, by a reduction of its own (for the places between steps)."""
        return verdict(accelerator.reduce(self.votes(accelerator.device), reduction="sum").tolist())

    def until_asked(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, up to where this process is asked to stop; what is made of them is then to be thrown away."""
        for batch in batches:
            if self.asked():
                return
            yield batch

    def obeyed(self) -> None:
        """Take the STOP file away, so that the same command goes on next time."""
        if self.main and self.stop is not None:
            with contextlib.suppress(OSError):
                self.stop.unlink(missing_ok=True)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled = signal.Signals(number).name, now
            if not self.started:
                raise Preempted(self._signal, agreed=False)
        elif now - self._signalled > (ECHO_SECONDS if launched() else 0.0):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _found(self, now: float) -> bool:
        if self.stop is not None and now - self._looked > _LOOK_SECONDS:
            self._looked, self._stop_seen = now, self.stop.exists()
        return self._stop_seen

    def _late(self, now: float) -> bool:
        """Whether what may come before the next look, and a save, would not fit before the limit any more."""
        if self.limit is None:
            return False
        longest = max((b - a for a, b in zip(self._polls, list(self._polls)[1:], strict=False)), default=0.0)
        return now + self._age + 1.5 * self.save_seconds + 2.0 * longest + _EXIT_SECONDS > self.limit


def verdict(votes: Iterable[float]) -> str | None:
    """The first of `REASONS` that anybody voted for."""
    return next((reason for reason, count in zip(REASONS, votes, strict=True) if count > 0), None)


def leave_when_asked() -> None:
    """While nothing has begun, leave at once at a signal, with the status that asks for another start."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(REQUEUE))


def launched() -> bool:
    """Whether torchrun or `accelerate launch` started this process."""
    return elastic() or "ACCELERATE_MIXED_PRECISION" in os.environ


def elastic() -> bool:
    """Whether the launcher is torchrun's, which accelerate uses too for several processes."""
    return "TORCHELASTIC_RUN_ID" in os.environ
