"""Laws of bad numbers: they change nothing, are skipped in a budget, then rolled back and passed, exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pretrain_kit import recipe
from test_resume import Killed, assert_same
from torch import nn

from pretrain import loop
from pretrain.guard import robust_score, trouble
from pretrain.loop import train
from pretrain.metrics import read_metrics
from pretrain.rollback import RunFailed

SETTINGS = {"train.steps": 20, "train.skips": 2, "train.ema": 0.9}


class PoisonedBy(nn.Module):
    """A model whose loss is `value` times itself wherever a batch holds one of certain samples."""

    def __init__(self, model: nn.Module, keys: set[int], value: float) -> None:
        super().__init__()
        self.model, self.keys, self.value = model, keys, value

    def forward(self, batch: Any, progress: float) -> Any:
        output = self.model(batch, progress)
        if self.keys & set(batch.keys.tolist()):
            output.loss_sum = output.loss_sum * self.value
        return output


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call with step numbers (as the straight order has them): their samples are poison from then on."""
    step = loop.take_step

    def choose(steps: set[int], value: float = math.nan, stop: int = -1) -> None:
        def poisoned(setup: Any, batches: Iterator[Any]) -> Any:
            if setup.state.step == stop:
                raise Killed
            if not isinstance(setup.model, PoisonedBy):
                setup.model = PoisonedBy(setup.model, _keys(setup, steps), value)
            return step(setup, batches)

        monkeypatch.setattr(loop, "take_step", poisoned)

    return choose


def _keys(setup: Any, steps: set[int]) -> set[int]:
    place, found = setup.loader.position, set()
    for number in steps:
        setup.loader.position = number * setup.loader.batch_size
        found |= set(next(iter(setup.loader)).keys.tolist())
    setup.loader.position = place
    return found


def test_what_is_trouble() -> None:
    calm = [1.0 + 0.01 * (n % 5) for n in range(64)]
    assert trouble(1.1, 1.0, calm, None, 64) is None
    assert trouble(math.inf, 1.0, [], None, 64) == "the loss is not finite"
    assert trouble(1.0, math.nan, [], None, 64) == "the gradient is not finite"
    assert "robust" in (trouble(1.5, 1.0, calm, 8.0, 64) or "")
    assert trouble(1.5, 1.0, calm[:31], 8.0, 64) is None, "a window that is hardly filled judges nobody"
    assert trouble(0.2, 1.0, calm, 8.0, 64) is None, "a fall is good"
    assert robust_score(1.02, calm) == 0.0
    # Half the window may be spikes before they count as usual.
    assert robust_score(9.0, [1.0, 1.01, 1.02, 1.03, 1.04, 9.0, 9.0]) > 100


def test_a_few_are_skipped_and_reported(digits: Path, tmp_path: Path, poison: Any) -> None:
    poison({6, 7})
    train(recipe("mae", digits / "train", SETTINGS), tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert {line["step"]: line["skipped"] for line in lines if "skipped" in line} == {7: 1, 8: 2}
    report = json.loads((tmp_path / "run" / "bad" / "step-000000007" / "report.json").read_text())
    assert (report["step"], report["position"], report["why"]) == (7, 96, "the loss is not finite")
    assert len(report["processes"][0]["ids"]) == len(report["processes"][0]["keys"]) == 16
    # One state for the two: nothing changed between them.
    states = [path.name for path in (tmp_path / "run" / "bad").glob("*/step-*")]
    assert states == ["step-000000006"]


def test_beyond_the_budget_the_run_goes_back_and_past_them(digits: Path, tmp_path: Path, poison: Any) -> None:
    poison({9, 10, 11})
    chosen = recipe("mae", digits / "train", SETTINGS)
    train(chosen, tmp_path / "straight")
    lines = read_metrics(tmp_path / "straight")
    (event,) = [line for line in lines if "rolled_back_from" in line]
    # Checkpoints at 4 and 8: back from 12 to 8, and past the samples of the steps 8 to 11.
    assert (event["step"], event["rolled_back_from"], event["left_out"]) == (8, 12, [8 * 16, 12 * 16])
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    assert all(math.isfinite(line["loss"]) for line in steps)
    assert [line["samples"] for line in steps] == [16 * n for n in range(1, 9)] + [16 * n for n in range(13, 25)]
    for stops in ([10], [9, 14], [11, 17]):
        run = tmp_path / "-".join(map(str, stops))
        for stop in stops:
            poison({9, 10, 11}, stop=stop)
            with pytest.raises(Killed):
                train(chosen, run)
        poison({9, 10, 11})
        train(chosen, run)
        assert_same(run, tmp_path / "straight")


def test_what_does_not_help_ends_the_run(digits: Path, tmp_path: Path, poison: Any) -> None:
    poison(set(range(5, 60)))
    with pytest.raises(RunFailed, match="after 3 roll-backs"):
        train(recipe("mae", digits / "train", SETTINGS), tmp_path / "run")
    events = [line for line in read_metrics(tmp_path / "run") if "rolled_back_from" in line]
    assert [event["step"] for event in events] == [4, 4, 4], "4 is the only checkpoint with a step to spare"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


def test_a_spike_is_skipped_and_its_window_survives(digits: Path, tmp_path: Path, poison: Any) -> None:
    settings = SETTINGS | {"train.spike": 8.0, "train.spike_window": 8}
    poison({12}, value=50.0)
    chosen = recipe("mae", digits / "train", settings)
    train(chosen, tmp_path / "straight")
    assert [line["step"] for line in read_metrics(tmp_path / "straight") if "skipped" in line] == [13]
    poison({12}, value=50.0, stop=10)
    with pytest.raises(Killed):
        train(chosen, tmp_path / "killed")
    poison({12}, value=50.0)
    train(chosen, tmp_path / "killed")
    assert_same(tmp_path / "killed", tmp_path / "straight")
