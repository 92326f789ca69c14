"""The run folder: what a run leaves on disk, made once by the main process."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from data.errors import UserError
from data.files import append, write_atomically
from pretrain.metrics import read_metrics
from pretrain.preemption import Preempted
from pretrain.recipe import RunRecipe
from pretrain.state import TrainingState

_PACKAGES = ("torch", "torchvision", "accelerate", "timm", "transformers", "lightly", "webdataset", "numpy")


class RunFolder:
    """Paths and records of one run; only the main process writes."""

    def __init__(self, path: Path, writes: bool = True) -> None:
        self.path, self.writes = path, writes
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.export = path / "export"
        self.alarm: str | None = None
        """What is wrong with what is learnt, in words; part of every status until it is None again."""
        self._lock: Any = None
        self._waiting = ""
        """Lines for metrics.jsonl that a full disk did not take."""

    def begin(self, recipe: RunRecipe, step: int) -> None:
        """Claim the folder, describe the run and cut metrics back to `step`, where it starts or goes on.

        Raises:
            UserError: the folder cannot be written, or another process is training into it.
        """
        if not self.writes:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim()
            text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
            write_atomically(self.path / "recipe.yaml", text)
            write_atomically(self.path / "command.txt", shlex.join(sys.argv) + "\n")
            write_atomically(self.path / "environment.json", json.dumps(_environment(), indent=1))
            self._cut_metrics(step)
            with open(self.path / "starts.jsonl", "a") as file:
                file.write(json.dumps({"step": step, "time": _now(), "host": platform.node()}) + "\n")
            self.status("running", step=step)
        except OSError as error:
            raise UserError(
                f"the run folder {self.path} cannot be written ({error.strerror}); choose another --output"
            ) from None

    @contextmanager
    def watched(self, state: TrainingState) -> Iterator[None]:
        """Say in status.json how the block ends: finished, preempted, interrupted (Ctrl-C) or failed."""
        try:
            yield
        except Preempted as stop:
            self.status("preempted", step=state.step, reason=stop.reason)
            raise
        except KeyboardInterrupt:
            self.status("interrupted", step=state.step)
            raise
        except BaseException as error:
            self.status("failed", step=state.step, reason=f"{type(error).__name__}: {error}")
            raise
        else:
            self.status("finished", step=state.step)
        finally:
            if self._lock is not None:
                self._lock.close()

    def status(self, state: str, **facts: Any) -> None:
        """Say in status.json that the run is running, finished, preempted, interrupted, hung or failed.

        On a disk that is full the file stays as it is: a run does not end for that.
        """
        if self.writes:
            record = {"state": state, "time": _now()} | ({"alarm": self.alarm} if self.alarm else {}) | facts
            with contextlib.suppress(OSError):
                write_atomically(self.path / "status.json", json.dumps(record, indent=1))

    def record(self, values: dict[str, Any]) -> None:
        """Append one JSON object to metrics.jsonl; on a full disk, together with a later one."""
        if self.writes:
            self._waiting += json.dumps(values) + "\n"
            with contextlib.suppress(OSError):
                append(self.metrics, self._waiting.encode())
                self._waiting = ""

    def rewind(self, step: int, event: dict[str, Any]) -> None:
        """Cut metrics.jsonl back to `step` and append `event`, unless it is there already."""
        self._cut_metrics(step)
        if self.writes and event not in read_metrics(self.path):
            self.record(event)

    def _claim(self) -> None:
        """Hold a lock on the folder for as long as this process lives."""
        self._lock = open(self.path / ".lock", "a")  # noqa: SIM115 - closed when the run ends
        try:
            # A lock of the process: unlike flock, a reading process forked off does not keep it.
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training into {self.path}; wait for it, stop it, or choose another --output"
            ) from None

    def _cut_metrics(self, step: int) -> None:
        if not self.metrics.exists():
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _environment() -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "packages": versions,
    }
