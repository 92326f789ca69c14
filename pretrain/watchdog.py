"""A run that stands still: seen by a thread, its stacks written, ended so that a launcher can start it again."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.exits import HUNG

_STEPS = 50
"""Step times that the median is taken of."""


class Watchdog:
    """Ends this process when no step has ended for `factor` times the median step, or `least` seconds if that is more.

    Every process has its own; steps are taken together, so when one stands still all do, and each writes the stacks
    of its threads to `folder`/process-N.txt. What is no step gets more time: see `during`.
    """

    def __init__(
        self,
        folder: Callable[[], Path],
        factor: float,
        least: float,
        process: int = 0,
        say: Callable[[str], None] = lambda _: None,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """For stacks in the folder that `folder` names when they are written.

        Args:
            process: this process's number.
            say: told in one sentence what happened, before the process ends; on the main one it notes `hung`.
            leave: ends the process with an exit status.
        """
        self.folder, self.factor, self.least, self.process = folder, factor, least, process
        self._say, self._leave = say, leave
        self._seconds: deque[float] = deque(maxlen=_STEPS)
        self._doing, self._patience = "the first step", 10.0
        self._quiet, self._still = 0.0, False
        """Seconds since the last sign of life, as this thread has lived them."""
        self._stop = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watch for as long as the block runs; not at all when `factor` is 0."""
        if not self.factor:
            yield self
            return
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()

    def step(self, seconds: float) -> None:
        """A step has ended that took so long. The first, which compiles, says nothing about the others."""
        if self._doing != "the first step":
            self._seconds.append(seconds)
        self._doing, self._patience, self._quiet = "a step", 1.0, 0.0

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Ten times the patience for something between two steps: an evaluation, a save, a start."""
        before = self._doing, self._patience
        self._doing, self._patience, self._quiet = what, 10.0, 0.0
        yield
        (self._doing, self._patience), self._quiet = before, 0.0

    @property
    def limit(self) -> float:
        """Seconds without a sign of life after which the process ends."""
        usual = statistics.median(self._seconds) if self._seconds else 0.0
        return max(self.factor * usual, self.least) * self._patience

    def _watch(self) -> None:
        last, tick = time.monotonic(), min(1.0, self.least / 10)
        while not self._stop.wait(tick):
            now = time.monotonic()
            # A process that was stopped (SIGSTOP, a suspended machine) has not lived that time.
            self._quiet += min(now - last, 5 * tick)
            last = now
            if self._quiet > self.limit:
                return self._bark()

    def _bark(self) -> None:
        reason = f"process {self.process} stood still in {self._doing} for {self._quiet:.0f} seconds"
        path = self.folder() / f"process-{self.process}.txt"
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {reason}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                os.fsync(file.fileno())
        with contextlib.suppress(OSError):
            print(f"headwater: {reason}; stacks in {path}", file=sys.stderr, flush=True)
            self._say(reason)
        # The others write theirs first: when one process ends, the launcher ends them all. The main one comes before
        # them, lest it takes their end for a failure of its own.
        time.sleep(min(3.0, self.least) * (1 if self.process == 0 else 2))
        self._leave(HUNG)
