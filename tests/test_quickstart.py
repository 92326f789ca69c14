"""The quickstart runs, survives its own kill, and what it claims is in its numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.embedded import shard_digits, write_source_task
from data.errors import UserError
from launch.quickstart import BUDGETS, Curve, judge, run


def _curves(ours: float, scratch: float) -> list[Curve]:
    return [
        Curve("pre-trained, linear probe", accuracy=[ours - 0.1] * len(BUDGETS)),
        Curve("pre-trained, full fine-tuning", accuracy=[ours] * len(BUDGETS)),
        Curve("from scratch", accuracy=[scratch] * len(BUDGETS)),
    ]


def test_the_verdict_says_what_the_curves_say() -> None:
    assert "+20 to +20 points against from scratch" in judge(_curves(0.9, 0.7))
    assert "no benefit over from scratch" in judge(_curves(0.7, 0.9))


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        run("images", tmp_path, seeds=1)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_digits_are_all_there_and_split_once(tmp_path: Path) -> None:
    from data.dataset import ShardedDataset

    train, test = (ShardedDataset(side) for side in shard_digits(tmp_path))
    assert (len(train), len(test)) == (1297, 500)
    keys = [{dataset.key(i) for i in range(len(dataset))} for dataset in (train, test)]
    assert not keys[0] & keys[1]
    assert set(test.labels()) == set(range(10))


def test_snippets_for_testing_come_from_unseen_files(tmp_path: Path) -> None:
    unlabelled, train, test = write_source_task(tmp_path)
    seen = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in unlabelled.rglob("*.py"))
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    labels = {json.loads(line)["label"] for line in train.read_text().splitlines()}
    assert {row["label"] for row in rows} == labels
    # Licence headers and the like recur; almost all snippets must be new.
    assert sum(row["text"] in seen for row in rows) < 0.03 * len(rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "text"])
def test_the_whole_quickstart(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "quickstart", kind, "--output", str(tmp_path / "q"), "--seeds", "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "q" / "summary.json").read_text())
    assert summary["killed_at_step"] > 0
    assert "resuming" in done.stderr
    assert (tmp_path / "q" / "quickstart.png").stat().st_size > 10_000
    curves = {name: curve["accuracy"] for name, curve in summary["curves"].items()}
    ours = [max(pair) for pair in zip(*(curves[n] for n in curves if n.startswith("pre-trained")), strict=True)]
    margin = 0.05 if kind == "images" else 0.0
    assert sum(ours) / len(ours) > sum(curves["untrained encoder"]) / len(ours) + margin
    if kind == "images":
        assert sum(ours) / len(ours) > sum(curves["from scratch"]) / len(ours) + margin
