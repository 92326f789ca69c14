"""`headwater status` tells how runs are going from their folders alone."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.errors import UserError
from launch.cli import main
from launch.status import duration, find_runs, read_status, table


def make_run(
    folder: Path, state: str = "running", train: dict[str, Any] | None = None, age: float = 0.0, **last: Any
) -> Path:
    """A run folder as a run leaves it, 40 steps in."""
    (folder / "checkpoints").mkdir(parents=True)
    recipe = {"train": {"batch_size": 10, "steps": 100, "epochs": None} | (train or {}), "watch": {"log_every": 10}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - age))
    (folder / "status.json").write_text(json.dumps({"state": state, "time": when, "step": 40}))
    line = {"step": 40, "samples": 400, "epoch": 0.5, "loss": 1.5, "samples_per_second": 20.0, "data_wait": 0.01}
    (folder / "metrics.jsonl").write_text(json.dumps(line | last) + "\n")
    (folder / "checkpoints" / "LATEST").write_text("step-000000040\n")
    return folder


def test_a_running_run(tmp_path: Path) -> None:
    status = read_status(make_run(tmp_path / "a"))
    assert (status.state, status.step, status.steps, status.done, status.health) == ("running", 40, 100, 0.4, "good")
    assert status.seconds_left == 60 * 10 / 20.0
    assert status.checkpoint == "step-000000040"


def test_steps_of_a_recipe_in_epochs_follow_from_the_metrics(tmp_path: Path) -> None:
    # 400 samples are half an epoch, so 3 epochs of 800 samples are 240 steps of 10.
    status = read_status(make_run(tmp_path / "a", train={"steps": None, "epochs": 3}))
    assert status.steps == 240


def test_a_run_that_writes_nothing_is_silent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert read_status(run, now=time.time() + 200).state == "running"
    silent = read_status(run, now=time.time() + 7200)
    assert silent.state == "silent"
    assert "nothing written for 2 h" in silent.health
    assert read_status(make_run(tmp_path / "b", state="finished"), now=time.time() + 7200).state == "finished"


def test_troubles_are_named(tmp_path: Path) -> None:
    assert "skipped" in read_status(make_run(tmp_path / "a", skipped=3)).health
    assert "data.workers" in read_status(make_run(tmp_path / "b", data_wait=0.4)).health


def test_a_run_before_its_first_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", train={"steps": None, "epochs": 3})
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints" / "LATEST").unlink()
    status = read_status(run)
    assert (status.steps, status.loss, status.checkpoint) == (None, None, None)
    assert "-" in table([status])


def test_runs_are_found_one_level_down(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    assert find_runs([tmp_path]) == runs
    assert find_runs([runs[1]]) == runs[1:]
    with pytest.raises(UserError, match="is no folder"):
        find_runs([tmp_path / "missing"])
    with pytest.raises(UserError, match="has started yet"):
        find_runs([runs[0] / "checkpoints"])


def test_columns_line_up(tmp_path: Path) -> None:
    statuses = [read_status(make_run(tmp_path / name)) for name in ("a", "much-longer")]
    head, *rows = table(statuses).splitlines()
    assert all(row.index("running") == head.index("state") for row in rows)


@pytest.mark.parametrize(
    ("seconds", "words"), [(45, "45 s"), (720, "12 min"), (18600, "5 h 10 min"), (273600, "3 d 4 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("status.json", "[1]"),
        ("status.json", '{"state": "running", "step": "x"}'),
        ("recipe.yaml", ""),
        ("recipe.yaml", "a: 1"),
        ("metrics.jsonl", b"\xff\xfe"),
        ("starts.jsonl", "x\n{}\n"),
        ("environment.json", "x"),
    ],
)
def test_a_folder_that_no_run_wrote_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str | bytes
) -> None:
    run = make_run(tmp_path / "a")
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    command = "report" if name in ("starts.jsonl", "environment.json") else "status"
    assert main([command, str(run), *["--no-pictures"] * (command == "report")]) == 2
    said = capsys.readouterr().err
    assert name in said
    assert len(said.splitlines()) == 1
