"""Laws of watching: ranks and spreads are what they say, a collapse is called one, and looking stays cheap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightly.utils.debug import std_of_l2_normalized
from pretrain_kit import recipe

from data.dataset import ShardedDataset
from data.loader import sequential
from pretrain import loop
from pretrain.collapse import alarm, effective_rank, spread
from pretrain.evaluate import WATCH_SHARE, cadence, evaluate
from pretrain.loop import train
from pretrain.metrics import read_metrics
from pretrain.probe import Probe, features, labelled_subset
from pretrain.setup import prepare


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_effective_rank_of_known_spectra() -> None:
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert effective_rank(draw(50, 1) @ draw(1, 8)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.zeros(5, 4)) == pytest.approx(1)
    left, right = torch.linalg.qr(draw(30, 3))[0], torch.linalg.qr(draw(7, 3))[0]
    shares = torch.tensor([0.5, 0.25, 0.25])
    entropy = -(shares * shares.log()).sum()
    for rows in ((left * shares) @ right.T, ((left * shares) @ right.T).T):
        assert effective_rank(rows) == pytest.approx(entropy.exp().item(), rel=1e-4)


def test_spread_is_nought_for_equal_and_one_for_isotropic_features() -> None:
    assert spread(torch.ones(9, 4)).item() == pytest.approx(0, abs=1e-6)
    assert spread(draw(4000, 64)).item() == pytest.approx(1, abs=0.01)
    features = draw(500, 16) + 1.5
    assert spread(features).item() == pytest.approx(std_of_l2_normalized(features).item() * 4, rel=2e-3)


def test_a_collapse_is_called_one_in_words() -> None:
    healthy = {"feature_spread": 0.3, "effective_rank": 8.0, "agreement": 0.999, "loss": 0.0}
    assert alarm(healthy) is None
    assert alarm({"loss": 3.0}) is None
    signs = {
        "feature_spread": "almost the same features (spread 0.001 of 1)",
        "effective_rank": "along one direction (effective rank 0.0)",
    }
    for name, words in signs.items():
        said = alarm(healthy | {name: 0.001})
        assert said is not None
        assert words in said
        assert "agree on everything (0.999)" in said
        assert "\n" not in said


def test_untrained_encoders_are_not_taken_for_collapsed(digits: Path, tmp_path: Path) -> None:
    setup = prepare(recipe("mae", digits / "train", {"data.validation": 0.1}), tmp_path)
    values = evaluate(setup)
    assert values.keys() >= {"knn_accuracy", "effective_rank", "feature_spread", "validation_loss"}
    assert alarm(values) is None


def test_rank_and_spread_need_neither_labels_nor_held_out_pictures(digits: Path, tmp_path: Path) -> None:
    setup = prepare(recipe("mae", digits / "train"), tmp_path)
    assert evaluate(setup).keys() == {"effective_rank", "feature_spread"}
    setup = prepare(recipe("mae", digits / "train", {"data.validation": 0.1, "watch.knn_samples": 0}), tmp_path)
    assert "knn_accuracy" not in evaluate(setup)


def test_a_collapsing_run_says_so_everywhere(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = loop.take_step

    def collapsing(setup: Any, batches: Any) -> Any:
        sums = step(setup, batches)
        if setup.state.step == 4:
            with torch.no_grad():  # every picture now gets the same feature
                setup.state.objective.encoder.norm.weight.zero_()
                setup.state.objective.encoder.norm.bias.fill_(1.0)
        return sums

    monkeypatch.setattr(loop, "take_step", collapsing)
    monkeypatch.setattr("pretrain.progress.ProgressLine.show", always_shown)
    settings = {"watch.evaluate_every": 2, "watch.evaluate_samples": 64, "train.steps": 8, "optimizer.lr": 1e-9}
    train(recipe("mae", digits / "train", settings), tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "finished"
    assert "almost the same features" in status["alarm"]
    alarms = [line["step"] for line in read_metrics(tmp_path / "run") if "alarm" in line]
    assert alarms == [4, 6, 8]
    said = capsys.readouterr().err
    assert "step 4: collapse: " in said
    assert [line.endswith("COLLAPSED") for line in said.splitlines() if line.startswith("step 3/")] == [False]
    assert [line.endswith("COLLAPSED") for line in said.splitlines() if line.startswith("step 5/")] == [True]


def always_shown(line: Any, step: int, loss: float, pace: Any) -> None:
    line._last = float("-inf")
    SHOW(line, step, loss, pace)


SHOW = loop.ProgressLine.show


@pytest.mark.parametrize("settings", [{}, {"data.validation": 0.2}, {"watch.knn_samples": 100, "train.batch_size": 7}])
def test_by_default_at_most_one_sample_in_a_hundred_is_looked_at(
    settings: dict[str, Any], digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = prepare(recipe("mae", digits / "train", settings | {"watch.evaluate_every": None}), tmp_path)
    seen = 0

    def counted(dataset: ShardedDataset, size: int, **more: Any) -> Any:
        nonlocal seen
        seen += len(more["ids"])
        return sequential(dataset, size, **more)

    monkeypatch.setattr("pretrain.probe.sequential", counted)
    monkeypatch.setattr("pretrain.evaluate.sequential", counted)
    evaluate(setup)
    assert 0 < seen * WATCH_SHARE <= cadence(setup) * setup.recipe.train.batch_size
    assert cadence(prepare(recipe("mae", digits / "train", {"watch.evaluate_every": 3}), tmp_path)) == 3


def test_each_process_extracts_a_share_and_all_get_everything_in_order(digits: Path, tmp_path: Path) -> None:
    setup = prepare(recipe("mae", digits / "train"), tmp_path)
    encoder, data, vision = setup.state.encoder(), setup.data.train, setup.recipe.encoder
    ids = labelled_subset(data, 23)
    whole, labels = features(encoder, data, vision, 8, ids)

    class Third:
        """One of three processes; `gather` returns what all of them sent the first time round."""

        num_processes = 3
        autocast = setup.accelerator.autocast

        def __init__(self, index: int, others: list[Third]) -> None:
            self.process_index, self.others, self.sent = index, others, []

        def gather(self, mine: torch.Tensor) -> torch.Tensor:
            self.sent.append(mine)
            return torch.cat([each.sent[len(self.sent) - 1] for each in self.others or [self] * 3])

    first = [Third(index, []) for index in range(3)]
    for process in first:
        Probe(encoder, vision, 8, process).features(data, ids)
    assert [len(process.sent[0]) for process in first] == [8, 8, 8]
    for index in range(3):
        found, found_labels = Probe(encoder, vision, 8, Third(index, first)).features(data, ids)
        torch.testing.assert_close(found, whole)
        assert torch.equal(found_labels, labels)


def test_the_bank_is_spread_over_the_dataset_and_the_same_each_time(digits: Path) -> None:
    data = ShardedDataset(digits / "train")
    ids = labelled_subset(data, 100)
    assert np.array_equal(ids, labelled_subset(data, 100))
    assert len(np.unique(ids)) == 100
    assert np.ptp(ids) > 0.8 * len(data)
