"""The law of resume: a run killed anywhere and started again is, bit for bit, the run that was left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretrain_kit import ENVIRONMENT, recipe, write_recipe

from pretrain import loop
from pretrain.loop import train
from pretrain.metrics import read_metrics

TIMED = ("samples_per_second", "data_wait")
"""What measures the machine, not the training."""


class Killed(BaseException):
    """Stands for SIGKILL in one process: no handler of the run's runs to any effect that counts."""


def losses(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock wrote."""
    return [{key: value for key, value in line.items() if key not in TIMED} for line in read_metrics(run)]


def outcome(run: Path) -> dict[str, bytes]:
    """The bytes of the last checkpoint's and the export's weights."""
    last = run / "checkpoints" / (run / "checkpoints" / "LATEST").read_text().strip()
    files = [*sorted(last.glob("*.safetensors")), run / "export" / "model.safetensors"]
    return {file.name if file.parent == last else "export": file.read_bytes() for file in files}


def assert_same(run: Path, straight: Path) -> None:
    assert losses(run) == losses(straight)
    ours, theirs = outcome(run), outcome(straight)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mae": ("mae", {"data.validation": 0.1, "watch.evaluate_every": 5, "watch.evaluate_samples": 32}),
    "mae, accumulated, average": ("mae", {"train.microbatch": 4, "train.ema": 0.9}),
    # 1,297 digits: twelve steps of 250 cross two ends of an epoch.
    "mae, several epochs": ("mae", {"train.batch_size": 250}),
    "mae, dropout": ("mae", {"encoder.model_args.drop_path_rate": 0.3, "encoder.model_args.proj_drop_rate": 0.2}),
    "mae, muon, moving decay": (
        "mae",
        {"optimizer.name": "muon", "optimizer.weight_decay_end": 0.4, "optimizer.layer_decay": 0.8},
    ),
    "mae, growing batch": ("mae", {"train.batch_warmup": {"start": 4, "samples": 60}, "train.microbatch": 2}),
    "text, growing context": ("next_token", {"train.context_warmup": {"start": 8, "share": 0.6}}),
    "mae, lamb, wsd": ("mae", {"optimizer.name": "lamb", "optimizer.schedule": "wsd"}),
    "hybrid": ("hybrid", {"train.context_warmup": {"start": 8, "share": 0.6}, "watch.evaluate_every": 6}),
    "masked": ("masked_language", {"watch.evaluate_every": 5, "objective.unit": "span", "train.microbatch": 4}),
    "replaced": ("replaced_token", {"watch.evaluate_every": 5, "train.microbatch": 4}),
    "text": ("next_token", {"watch.evaluate_every": 5}),
    "text, accumulated, average": ("next_token", {"train.microbatch": 2, "train.ema": 0.9}),
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_in_process_and_resumed(
    case: str, digits: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, settings = CASES[case]
    chosen = recipe(objective, digits / "train" if objective == "mae" else sentences, settings)
    train(chosen, tmp_path / "straight")
    step = loop.take_step
    for stops in ([4], [1, 6, 11]):
        run = tmp_path / "-".join(map(str, stops))
        for stop in stops:

            def stopping(setup: Any, batches: Any, stop: int = stop) -> Any:
                if setup.state.step == stop:
                    raise Killed
                return step(setup, batches)

            with monkeypatch.context() as patch:
                patch.setattr(loop, "take_step", stopping)
                with pytest.raises(Killed):
                    train(chosen, run)
        train(chosen, run)
        assert_same(run, tmp_path / "straight")


def test_killed_between_the_last_step_and_the_end_of_the_export(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = recipe("mae", digits / "train")
    train(chosen, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "export")
    train(chosen, tmp_path / "cut")
    assert_same(tmp_path / "cut", tmp_path / "straight")


def test_a_finished_run_is_left_as_it_is(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = recipe("mae", digits / "train", {"train.steps": 2})
    train(chosen, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert train(chosen, tmp_path / "run") == tmp_path / "run" / "export"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    assert "already ended at step 2" in capsys.readouterr().err


def test_ctrl_c_is_noted(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe("mae", digits / "train"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text()) | {"time": 0} == {
        "state": "interrupted",
        "time": 0,
        "step": 0,
    }


def kill_at(words: list[str], run: Path, step: int) -> None:
    """Start a run and SIGKILL it once metrics.jsonl has reached `step`."""
    process = subprocess.Popen(
        words, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (run / "metrics.jsonl").exists():
            reached = read_metrics(run)
            if reached and reached[-1]["step"] >= step:
                break
        time.sleep(0.005)
    assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def killed_and_resumed(words: Callable[[Path], list[str]], tmp_path: Path, kills: list[int]) -> None:
    straight, run = tmp_path / "straight", tmp_path / "killed"
    subprocess.run(words(straight), env=ENVIRONMENT, check=True, capture_output=True)
    for step in kills:
        kill_at(words(run), run, step)
    # What a launcher's workers still wrote is over once the folder is free; the same command waits for that.
    for _ in range(20):
        done = subprocess.run(words(run), env=ENVIRONMENT, capture_output=True, text=True)
        if "another process is training" not in done.stderr:
            break
        time.sleep(0.5)
    assert done.returncode == 0, done.stderr
    assert_same(run, straight)


@pytest.mark.parametrize(("objective", "workers"), [("mae", 2), ("next_token", 0)])
def test_killed_by_the_system_and_resumed(
    objective: str, workers: int, digits: Path, sentences: Path, tmp_path: Path
) -> None:
    settings = {"data.workers": workers, "train.steps": 60, "train.microbatch": 4, "train.ema": 0.9}
    data = digits / "train" if objective == "mae" else sentences
    path = write_recipe(tmp_path / "tiny.yaml", objective, data, settings)
    kills = [random.Random(workers).randrange(5, 45)]
    killed_and_resumed(lambda run: [sys.executable, "-m", "pretrain", str(path), "--output", str(run)], tmp_path, kills)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("objective", ["mae", "next_token"])
def test_killed_often_and_resumed(objective: str, workers: int, digits: Path, sentences: Path, tmp_path: Path) -> None:
    settings = {"data.workers": workers, "train.steps": 120, "train.ema": 0.9, "watch.checkpoint_every": 7}
    data = digits / "train" if objective == "mae" else sentences
    path = write_recipe(tmp_path / "tiny.yaml", objective, data, settings)
    kills = sorted(random.Random(workers).sample(range(1, 100), 6))
    killed_and_resumed(lambda run: [sys.executable, "-m", "pretrain", str(path), "--output", str(run)], tmp_path, kills)


def two_processes(path: Path) -> Callable[[Path], list[str]]:
    start = [sys.executable, "-m", "launch.cli", "pretrain", str(path), "--processes", "2", "--output"]
    return lambda run: [*start, str(run)]


def test_two_processes_killed_and_resumed(digits: Path, tmp_path: Path) -> None:
    settings = {"train.steps": 40, "train.microbatch": 4, "train.ema": 0.9, "watch.trackers": ["tensorboard"]}
    settings |= {"data.validation": 0.1, "watch.evaluate_every": 20, "watch.evaluate_samples": 33}
    path = write_recipe(tmp_path / "tiny.yaml", "mae", digits / "train", settings)
    killed_and_resumed(two_processes(path), tmp_path, [random.Random(3).randrange(5, 30)])
    straight = tmp_path / "straight"
    assert len(list((straight / "trackers").glob("*/events*"))) == 1
    # And one process takes the same steps, but for rounding.
    train(recipe("mae", digits / "train", settings), tmp_path / "alone")
    assert len(list((tmp_path / "alone" / "trackers").glob("*/events*"))) == 1
    for two, one in zip(losses(straight), losses(tmp_path / "alone"), strict=True):
        assert two == pytest.approx(one, rel=2e-3), (two, one)


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "shard"), [("mae", True), ("next_token", False)])
def test_two_processes_killed_often_and_resumed(
    objective: str, shard: bool, digits: Path, sentences: Path, tmp_path: Path
) -> None:
    settings = {"train.steps": 120, "data.workers": 2, "watch.checkpoint_every": 7, "train.shard": shard}
    data = digits / "train" if objective == "mae" else sentences
    path = write_recipe(tmp_path / "tiny.yaml", objective, data, settings)
    killed_and_resumed(two_processes(path), tmp_path, sorted(random.Random(5).sample(range(1, 90), 3)))


@pytest.mark.slow
def test_killed_at_fifty_random_moments(digits: Path, tmp_path: Path) -> None:
    settings = {"train.steps": 600, "train.ema": 0.9, "train.batch_size": 4, "watch.log_every": 50}
    server = Path(__file__).with_name("kill_server.py")
    for run, kills, every in (("straight", 0, 500), ("killed", 50, 1)):
        path = write_recipe(
            tmp_path / f"{run}.yaml", "mae", digits / "train", settings | {"watch.checkpoint_every": every}
        )
        done = subprocess.run(
            [sys.executable, server, path, tmp_path / run, str(kills), "0.1"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == sorted(found["steps"]), "a newer whole checkpoint was passed over"
    assert found["met"] > 10, "too few kills met a save"
    assert_same(tmp_path / "killed", tmp_path / "straight")
