"""SLURM jobs: the script says what was asked, and on a real SLURM a run is preempted, requeued and finished."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import slurm_kit
from pretrain_kit import ENVIRONMENT, write_recipe
from safetensors.torch import load_file

from data.errors import UserError
from launch.slurm import Job, current, script, seconds_of

JOB = Job(Path("/shared/runs/a"), ["mae_cifar10", "data.train=/shared/my shards"], nodes=4, gpus=8, cpus=64)


def test_the_script_asks_for_what_was_asked() -> None:
    text = script(replace(JOB, options=["--qos=long"], setup=["module load cuda"], lead=120))
    for line in (
        "--nodes=4",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--signal=USR1@120",
        "--requeue",
        "--qos=long",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "'data.train=/shared/my shards'" in text
    assert "    module load cuda\n" in text
    assert "--processes 8" in text
    assert re.search(r"#SBATCH.*gpus", script(replace(JOB, gpus=0))) is None


def test_bash_reads_it() -> None:
    subprocess.run(["bash", "-n"], input=script(JOB), text=True, check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 0}, "--nodes 0"),
        ({"gpus": -1}, "--gpus -1"),
        ({"time": "3 hours"}, "--time '3 hours'"),
        ({"time": "4", "lead": 240}, "--lead 240"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        script(replace(JOB, **change))


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("30", 1800), ("2:30", 150), ("24:00:00", 86400), ("2-0", 172800), ("1-12:30", 131400), ("1-01:01:01", 90061)],
)
def test_time_limits_are_read_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


def test_without_slurm_the_script_is_left_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.slurm import submit, write

    path = write(replace(JOB, run=tmp_path / "a"))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="no sbatch"):
        submit(path)
    assert path.exists()


def test_a_place_where_nothing_can_be_written_is_said(tmp_path: Path) -> None:
    from launch import slurm, slurm_array

    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        slurm.write(replace(JOB, run=tmp_path / "file" / "run"))
    with pytest.raises(UserError, match="cannot be written"):
        slurm_array.write(slurm_array.Array(tmp_path / "file" / "out", ["images"], parts=2))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    reason = slurm_kit.missing()
    if reason:
        pytest.skip(reason)
    with slurm_kit.slurm(tmp_path_factory.mktemp("slurm")):
        yield


@pytest.fixture(scope="module")
def straight(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and the run of two processes that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    settings = {"train.steps": 300, "watch.checkpoint_every": 20, "watch.log_every": 5, "data.workers": 0}
    recipe = write_recipe(folder / "tiny.yaml", "mae", digits / "train", settings)
    headwater("pretrain", recipe, "--processes", "2", "--output", folder / "run")
    return recipe, folder / "run"


def headwater(*words: str | Path) -> str:
    """What `headwater WORDS` prints."""
    command = [sys.executable, "-m", "launch.cli", *map(str, words)]
    environment = ENVIRONMENT | {"SLURM_CONF": os.environ.get("SLURM_CONF", "")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def submitted(recipe: Path, run: Path) -> int:
    """Submit the recipe to two nodes; both are this machine, whatever SLURM calls them."""
    words = ["launch", "slurm", recipe, "--nodes", "2", "--time", "00:10:00", "--output", run]
    printed = headwater(*words, "--setup", "export HEADWATER_MAIN=127.0.0.1 OMP_NUM_THREADS=1")
    return int(printed.split()[1].rstrip(":"))


def reached(run: Path, step: int) -> bool:
    metrics = run / "metrics.jsonl"
    return metrics.exists() and len(metrics.read_text().splitlines()) > step // 5


def begun(recipe: Path, run: Path) -> int:
    """Submit the recipe and wait until it trains."""
    number = submitted(recipe, run)
    slurm_kit.until(lambda: reached(run, 30), 120, "the run has begun")
    return number


def log(run: Path, number: int) -> str:
    path = run / "slurm" / f"{number}.log"
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_told_to_stop_it_requeues_and_ends_as_if_nothing_had_been(
    cluster: None, straight: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, undisturbed = straight
    run = tmp_path / "run"
    number = begun(recipe, run)
    subprocess.run(["scancel", "--signal=USR1", str(number)], check=True)  # as SLURM does before the time limit
    slurm_kit.until(lambda: slurm_kit.job(number, "Restarts") == "1", 90, f"requeued\n{log(run, number)}")
    slurm_kit.until(lambda: slurm_kit.job(number, "JobState") in ("COMPLETED", "FAILED"), 180, log(run, number))
    assert slurm_kit.job(number, "JobState") == "COMPLETED", log(run, number)
    assert "resuming" in log(run, number)
    assert_equal_exports(run, undisturbed)


@pytest.mark.slow
def test_a_node_that_fails_is_left_out_of_the_next_try(
    cluster: None, straight: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, undisturbed = straight
    run = tmp_path / "run"
    number = begun(recipe, run)
    first = set(slurm_kit.tell("scontrol", "show", "hostnames", slurm_kit.job(number, "NodeList")).split())
    victim = sorted(first)[-1]
    kill_launcher(victim)
    slurm_kit.until(lambda: current(run) != number, 150, f"submitted again\n{log(run, number)}")
    number = current(run)
    slurm_kit.until(lambda: slurm_kit.job(number, "JobState") in ("COMPLETED", "FAILED"), 180, log(run, number))
    assert slurm_kit.job(number, "JobState") == "COMPLETED", log(run, number)
    second = set(slurm_kit.tell("scontrol", "show", "hostnames", slurm_kit.job(number, "NodeList")).split())
    assert victim not in second
    assert "resuming" in log(run, number)
    assert_equal_exports(run, undisturbed)


def kill_launcher(node: str) -> None:
    """SIGKILL to the launcher that runs as `node`."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"launch.cli" in words and f"SLURMD_NODENAME={node}".encode() in environment:
            subprocess.run(["kill", "-9", path.name], check=True)
            return
    raise AssertionError(f"no launcher on {node}")


def assert_equal_exports(run: Path, undisturbed: Path) -> None:
    found, wanted = (load_file(each / "export" / "model.safetensors") for each in (run, undisturbed))
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)
