"""`headwater status RUN…`: how runs are going, read from their folders alone."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from data.errors import UserError
from pretrain.metrics import read_metrics

SILENT_STEPS = 20
"""A run that says it is running is called silent after the time of this many logged lines, …"""
SILENT_SECONDS = 300.0
"""… and not before this many seconds."""
_COLUMNS = ("run", "state", "step", "done", "loss", "samples/s", "data wait", "left", "checkpoint", "health")


@dataclass
class Status:
    """What a run's folder says of it."""

    run: str
    state: str
    """running, finished, preempted, interrupted, failed, … as the run itself last said, or `silent`."""
    step: int
    steps: int | None
    """Optimiser steps of the whole run; None until the first line of metrics tells, for a recipe in epochs."""
    loss: float | None
    samples_per_second: float | None
    data_wait: float | None
    """Share of the step time spent waiting for data."""
    seconds_left: float | None
    """At the present speed; None unless the run is running."""
    checkpoint: str | None
    """The newest checkpoint's name."""
    checkpoint_age: float | None
    """Seconds since it was written."""
    health: str
    """In words: `good`, or what is wrong."""

    @property
    def done(self) -> float | None:
        """Share of the steps taken."""
        return self.step / self.steps if self.steps else None


def read_status(run: Path, now: float | None = None) -> Status:
    """The status of one run folder, at `now` (seconds since 1970; the present by default).

    Raises:
        UserError: there is no run in this folder.
    """
    now = time.time() if now is None else now
    said, recipe = _said(run)
    lines = [line for line in logged(run) if "loss" in line]
    last = lines[-1] if lines else {}
    step = max(int(said.get("step", 0)), int(last.get("step", 0)))
    steps, speed = _steps(recipe, last), last.get("samples_per_second")
    state = str(said.get("state", "unknown"))
    quiet = now - _changed(run)
    if state == "running" and quiet > max(SILENT_SECONDS, SILENT_STEPS * _interval(lines, recipe)):
        state = "silent"
    left = None
    if state == "running" and steps and speed:
        left = max(0.0, (steps - step) * recipe["train"]["batch_size"] / speed)
    name, age = _checkpoint(run, now)
    return Status(
        run=str(run),
        state=state,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        samples_per_second=speed,
        data_wait=last.get("data_wait"),
        seconds_left=left,
        checkpoint=name,
        checkpoint_age=age,
        health=_health(state, said, last, quiet),
    )


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The run folders among `places` and one level below them, by name.

    Raises:
        UserError: a place does not exist, or holds no run.
    """
    found: list[Path] = []
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place} is no folder; give run folders, or a folder that holds some (such as runs)")
        if (place / "status.json").is_file():
            found.append(place)
            continue
        below = sorted(path.parent for path in place.glob("*/status.json"))
        if not below:
            raise UserError(f"no run in {place} has started yet (there is no status.json)")
        found += below
    return found


def table(statuses: Sequence[Status]) -> str:
    """The statuses as aligned columns."""
    rows = [_COLUMNS] + [_row(status) for status in statuses]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def as_json(statuses: Sequence[Status]) -> list[dict[str, Any]]:
    """The statuses as plain dictionaries."""
    return [asdict(status) | {"done": status.done} for status in statuses]


def duration(seconds: float) -> str:
    """Seconds in words short enough for a table: `45 s`, `12 min`, `5 h 10 min`, `3 d 4 h`."""
    minutes = int(seconds // 60)
    if minutes < 1:
        return f"{int(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _row(status: Status) -> tuple[str, ...]:
    of = f"/{status.steps:,}" if status.steps else ""
    age = f" ({duration(status.checkpoint_age)} ago)" if status.checkpoint_age is not None else ""
    return (
        status.run,
        status.state,
        f"{status.step:,}{of}",
        "-" if status.done is None else f"{status.done:.1%}",
        "-" if status.loss is None else f"{status.loss:.4f}",
        "-" if status.samples_per_second is None else f"{status.samples_per_second:,.0f}",
        "-" if status.data_wait is None else f"{status.data_wait:.0%}",
        "-" if status.seconds_left is None else duration(status.seconds_left),
        "-" if status.checkpoint is None else status.checkpoint + age,
        status.health,
    )


def _said(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run's status.json and its resolved recipe."""
    try:
        said = json.loads((run / "status.json").read_text())
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{run} is no run folder ({Path(error.filename).name} is missing)") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"the run folder {run} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(said, dict) or not isinstance(said.get("step", 0), int):
        raise UserError(f"{run / 'status.json'} was not written by a run; give the folder of one")
    if not isinstance(recipe, dict) or not all(isinstance(recipe.get(key), dict) for key in ("train", "watch")):
        raise UserError(f"{run / 'recipe.yaml'} is not the recipe of a run; give the folder of one")
    return said, recipe


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics that tell their step; none before the first.

    Raises:
        UserError: the file is not text.
    """
    if not (run / "metrics.jsonl").exists():
        return []
    try:
        return [line for line in read_metrics(run) if isinstance(line, dict) and isinstance(line.get("step"), int)]
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'metrics.jsonl'} cannot be read ({error})") from None


def _steps(recipe: dict[str, Any], last: dict[str, Any]) -> int | None:
    train = recipe["train"]
    if train.get("steps"):
        return int(train["steps"])
    if not last.get("epoch"):
        return None
    # Samples of an epoch follow from where the last line stands.
    samples = round(last["samples"] / last["epoch"])
    return max(1, round(train["epochs"] * samples / train["batch_size"]))


def _changed(run: Path) -> float:
    return max((run / name).stat().st_mtime for name in ("status.json", "metrics.jsonl") if (run / name).exists())


def _interval(lines: list[dict[str, Any]], recipe: dict[str, Any]) -> float:
    """Seconds between two lines of metrics, at the run's last speed."""
    if not lines or not lines[-1].get("samples_per_second"):
        return 0.0
    return recipe["watch"]["log_every"] * recipe["train"]["batch_size"] / lines[-1]["samples_per_second"]


def _checkpoint(run: Path, now: float) -> tuple[str | None, float | None]:
    latest = run / "checkpoints" / "LATEST"
    try:
        name = latest.read_text().strip()
        return name, max(0.0, now - latest.stat().st_mtime)
    except OSError:
        return None, None


def _health(state: str, said: dict[str, Any], last: dict[str, Any], quiet: float) -> str:
    troubles = []
    if state == "silent":
        troubles.append(f"nothing written for {duration(quiet)}")
    if said.get("reason"):
        troubles.append(textwrap.shorten(str(said["reason"]), 100, placeholder=" …"))
    if last.get("skipped"):
        troubles.append(f"{last['skipped']} steps in a row skipped (not finite)")
    if state == "running" and (last.get("data_wait") or 0.0) > 0.1:
        troubles.append("waits for data: raise data.workers")
    since = said.get("time")
    if state == "silent" and since:
        troubles.append(f"last word {str(since)[:16].replace('T', ' ')}")
    return "; ".join(troubles) or "good"
