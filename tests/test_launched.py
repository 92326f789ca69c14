"""Two launched processes: one meets bad numbers, stands still, is told to stop; the launcher is told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pretrain_kit import ENVIRONMENT, REPOSITORY, write_recipe

from pretrain.metrics import read_metrics, read_starts
from pretrain.preemption import REQUEUE

TROUBLE = """
import os, signal, sys, threading, time

def take(setup, batches):
    loop = sys.modules["pretrain.loop"]
    second, life = os.environ["RANK"] == "1", os.environ["TORCHELASTIC_RESTART_COUNT"]
    objective, forward = setup.state.objective, type(setup.state.objective).forward
    if second and setup.state.step == 3:
        objective.forward = lambda *words: poisoned(forward(objective, *words))
    elif second and life == "0" and setup.state.step == 9:
        time.sleep(600)
    elif second and life == "1" and setup.state.step == 11:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        return taken(setup, batches)
    finally:
        vars(objective).pop("forward", None)

def poisoned(output):
    output.loss_sum = output.loss_sum * float("nan")
    return output

def patch():
    global taken
    while not hasattr(sys.modules.get("pretrain.loop"), "_opening"):
        time.sleep(0.001)
    loop = sys.modules["pretrain.loop"]
    taken, loop.take_step = loop.take_step, take

if "RANK" in os.environ:
    threading.Thread(target=patch, daemon=True).start()
"""


def start(recipe: Path, run: Path, *words: str, path: Path | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli", "pretrain", str(recipe), "--output", str(run), "--processes", "2"]
    places = os.pathsep.join(map(str, filter(None, [path, REPOSITORY])))
    environment = ENVIRONMENT | {"PYTHONPATH": places}
    return subprocess.Popen([*command, *words], env=environment, stderr=subprocess.PIPE, text=True)


def status(run: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((run / "status.json").read_text())
    return said


@pytest.mark.slow
@pytest.mark.xfail(reason="after a restart, gloo's processes find the addresses of those that ended", strict=False)
def test_one_of_two_is_bad_then_hangs_then_is_told_to_stop(digits: Path, tmp_path: Path) -> None:
    """NaN on one rank, a rank that sleeps, SIGTERM to one rank: one launch, started again once by the launcher."""
    (tmp_path / "sitecustomize.py").write_text(TROUBLE)
    settings = {"train.steps": 400, "watch.hang_seconds": 8.0}
    recipe, run = write_recipe(tmp_path / "tiny.yaml", "mae", digits / "train", settings), tmp_path / "run"
    process = start(recipe, run, "--max-restarts", "1", path=tmp_path)
    _, errors = process.communicate(timeout=280)
    assert process.returncode == REQUEUE, errors
    assert "Traceback" not in errors
    # The poisoned step was skipped by both, once.
    assert [line["step"] for line in read_metrics(run) if "skipped" in line] == [4]
    report = json.loads((run / "bad" / "step-000000004" / "report.json").read_text())
    finite = [each["loss_sum"] == each["loss_sum"] for each in report["processes"]]
    assert finite == [True, False]
    # Both wrote their stacks, and the sleeper's name where it slept; the launcher brought them back from step 8.
    stacks = [(run / "stacks" / "step-000000009" / f"process-{rank}.txt").read_text() for rank in (0, 1)]
    assert ["in take\n" in text for text in stacks] == [True, True]
    assert 'sitecustomize.py", line 11' in stacks[1]
    assert [line["step"] for line in read_starts(run)] == [0, 8]
    said = status(run)
    assert (said["state"], said["step"], said["reason"]) == ("preempted", 12, "SIGTERM")
    assert (run / "checkpoints" / "LATEST").read_text() == "step-000000012\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_launcher_is_told_to_stop(number: signal.Signals, digits: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", "mae", digits / "train", {"train.steps": 100_000})
    run = tmp_path / "run"
    process = start(recipe, run)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len(read_metrics(run)) > 3:
            break
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == REQUEUE, errors
    assert "Traceback" not in errors
    said = status(run)
    assert (said["state"], said["reason"]) == ("preempted", number.name)
    assert (run / "checkpoints" / "LATEST").read_text() == f"step-{said['step']:09d}\n"
