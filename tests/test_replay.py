"""Laws of replay: a step is rebuilt bit for bit, wherever it lies, and what is not finite in it is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pretrain_kit import recipe

from data.errors import UserError
from launch.cli import main
from pretrain.loop import train
from pretrain.metrics import read_metrics
from pretrain.objectives.masked_image import MaskedAutoencoder
from pretrain.replay import replay
from pretrain.rollback import RunFailed


def test_any_step_is_rebuilt_bit_for_bit(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe("mae", digits / "train", {"train.microbatch": 4}), run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for step, retaken in ((3, 2), (9, 0), (12, 3)):  # checkpoints at 8 and 12 are left
        found = replay(run, step)
        assert (found.same, found.retaken) == (True, retaken)
        assert math.hypot(*found.layers.values()) == pytest.approx(found.gradient_norm, rel=1e-6)
        assert (found.samples, found.first) == ([], None)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before, "it writes nothing"
    with pytest.raises(UserError, match="has no step 13; its steps are 1 to 12"):
        replay(run, 13)


def test_the_bad_sample_is_named(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe("mae", digits / "train", {"train.steps": 8})
    train(chosen, tmp_path / "good")
    forward, poison = MaskedAutoencoder.forward, None

    def poisoned(self: Any, batch: Any, progress: float) -> Any:
        output = forward(self, batch, progress)
        if poison in batch.ids.tolist():
            output.loss_sum = output.loss_sum * math.inf
        return output

    monkeypatch.setattr(MaskedAutoencoder, "forward", poisoned)
    from pretrain.setup import prepare

    setup = prepare(chosen, tmp_path / "nothing")
    setup.loader.position = 5 * 16
    poison = next(iter(setup.loader)).ids.tolist()[7]
    train(chosen, tmp_path / "bad")
    assert [line["step"] for line in read_metrics(tmp_path / "bad") if "skipped" in line] == [6]
    found = replay(tmp_path / "bad", 6)
    assert (found.same, found.retaken) == (True, 0)
    assert [sample["id"] for sample in found.samples] == [poison]
    assert found.state.endswith("bad/step-000000006/step-000000005")


def test_a_run_that_blew_up(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    settings = {"optimizer.lr": 1e25, "optimizer.warmup": 0.0, "train.skips": 1, "train.rollbacks": 0}
    with pytest.raises(RunFailed, match="headwater replay"):
        train(recipe("mae", digits / "train", settings), run)
    bad = min(line["step"] for line in read_metrics(run) if "skipped" in line)
    assert main(["replay", str(run), str(bad), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is True
    assert found["first"] is not None
    assert len(found["samples"]) == 16, "it is the weights, not a sample"
    assert main(["replay", str(run), str(bad)]) == 1
    assert "16 samples are not finite alone" in capsys.readouterr().out
    assert main(["replay", str(tmp_path), "1"]) == 2
    assert "is no run folder" in capsys.readouterr().err
