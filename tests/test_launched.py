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

from pretrain.exits import REQUEUE
from pretrain.metrics import read_metrics, read_starts

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


def start(recipe: Path, run: Path, *words: str, path: Path | None = None, processes: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.cli", "pretrain", str(recipe), "--output", str(run)]
    command += ["--processes", str(processes)]
    places = os.pathsep.join(map(str, filter(None, [path, REPOSITORY])))
    environment = ENVIRONMENT | {"PYTHONPATH": places}
    return subprocess.Popen([*command, *words], env=environment, stderr=subprocess.PIPE, text=True)


def status(run: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((run / "status.json").read_text())
    return said


@pytest.mark.slow
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


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until the run has logged `step`, or has ended, or 200 seconds have passed."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in read_metrics(run)):
            return
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_launcher_is_told_to_stop(number: signal.Signals, digits: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", "mae", digits / "train", {"train.steps": 100_000})
    run = tmp_path / "run"
    process = start(recipe, run)
    wait_for_step(process, run, 4)
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == REQUEUE, errors
    assert "Traceback" not in errors
    said = status(run)
    assert (said["state"], said["reason"]) == ("preempted", number.name)
    assert (run / "checkpoints" / "LATEST").read_text() == f"step-{said['step']:09d}\n"


@pytest.mark.slow
def test_one_two_four_and_one_process_train_as_one(digits: Path, tmp_path: Path) -> None:
    """Stopped and gone on with another number of processes within an epoch: the same steps, losses close."""
    settings = {"train.steps": 200, "train.batch_size": 64, "watch.log_every": 1, "watch.checkpoint_every": 1000}
    recipe = write_recipe(tmp_path / "tiny.yaml", "mae", digits / "train", settings)
    straight, elastic = tmp_path / "straight", tmp_path / "elastic"
    assert start(recipe, straight, processes=1).wait(timeout=200) == 0
    stops = []
    for processes in (1, 2, 4):
        process = start(recipe, elastic, processes=processes)
        wait_for_step(process, elastic, (stops[-1] if stops else 0) + 5)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=200)
        assert process.returncode == REQUEUE, errors
        stops.append(status(elastic)["step"])
    assert start(recipe, elastic, processes=1).wait(timeout=200) == 0
    assert [line["step"] for line in read_starts(elastic)] == [0, *stops]
    assert any(stop * 64 % 1297 for stop in stops), "one of them was within an epoch"
    found, wanted = read_metrics(elastic), read_metrics(straight)
    for name in ("step", "samples", "epoch"):
        assert [line[name] for line in found] == [line[name] for line in wanted]
    # The sums of a batch are added in another order, and that is all: the same pictures, crops and masks.
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in wanted], rel=1e-3)
