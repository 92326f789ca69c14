"""SLURM arrays of `headwater shard`: the scripts say what was asked, and a real SLURM makes the dataset of one job."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import slurm_kit
from PIL import Image
from test_preparation import same

from data.errors import UserError
from launch.cli import main
from launch.slurm_array import Array, scripts

ARRAY = Array(Path("/shared/sets/mine"), ["images", "/shared/my pictures", "/shared/sets/mine"], parts=8)


def test_every_part_runs_once_and_the_merge_is_told_the_dataset() -> None:
    found = scripts(ARRAY)
    assert "#SBATCH --array=0-7\n" in found["parts.sh"]
    assert "'/shared/my pictures'" in found["parts.sh"]
    assert '--part "$SLURM_ARRAY_TASK_ID/8"' in found["parts.sh"]
    assert "shard merge /shared/sets/mine" in found["merge.sh"]
    for text in found.values():
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_what_makes_no_sense_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--parts 0"):
        scripts(Array(tmp_path, [], parts=0))
    assert main(["launch", "shard", "images", str(tmp_path / "no"), str(tmp_path / "out"), "--parts", "2"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "shard", "images", str(tmp_path), str(tmp_path / "out"), "--parts", "2", "--dry-run"]) == 0
    assert "--array=0-1" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_on_a_real_slurm_the_parts_become_the_dataset_of_one_job(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = slurm_kit.missing()
    if reason:
        pytest.skip(reason)
    pictures = tmp_path / "pictures"
    for label in "ab":
        (pictures / label).mkdir(parents=True)
        for number in range(10):
            noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(pictures / label / f"{number}.png")
    options = ["--shard-size", "4"]
    assert main(["shard", "images", str(pictures), str(tmp_path / "straight"), *options]) == 0
    with slurm_kit.slurm(tmp_path_factory.mktemp("slurm")):
        words = ["launch", "shard", "images", str(pictures), str(tmp_path / "mine"), "--parts", "3", "--cpus", "1"]
        words += [f"--shard={option}" for option in options]
        environment = os.environ.get("SLURM_CONF", "")
        assert main([*words, "--setup", f"export SLURM_CONF={environment}"]) == 0
        merge = int(capsys.readouterr().out.split("; job ")[1].split()[0])
        done = ("COMPLETED", "FAILED", "CANCELLED")
        slurm_kit.until(lambda: slurm_kit.job(merge, "JobState") in done, 120, "the merge has ended")
        assert slurm_kit.job(merge, "JobState") == "COMPLETED"
    same(tmp_path / "mine", tmp_path / "straight")
    ours, theirs = (json.loads((tmp_path / name / "dataset.json").read_text()) for name in ("mine", "straight"))
    assert ours.pop("plan")  # of the parts, which one job has none of
    assert ours == theirs
