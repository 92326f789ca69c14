"""Reading a run's metrics.jsonl; imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl; a last line that a crash cut short is passed over."""
    return _objects(run / "metrics.jsonl")


def read_starts(run: Path) -> list[dict[str, Any]]:
    """One object for each time the run was started or resumed: `step`, `time`, `host`."""
    return _objects(run / "starts.jsonl") if (run / "starts.jsonl").exists() else []


def _objects(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
