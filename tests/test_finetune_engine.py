"""Fine-tuning by pretrain's loop: a run that is killed goes on bit for bit, however its batches are split."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from pretrain_kit import ENVIRONMENT
from torch import nn
from torch.testing import assert_close

from data.errors import UserError
from finetune.encoder import Encoder, load_encoder
from finetune.features import accelerator_for
from finetune.heads import LinearHead
from finetune.job import make_job
from finetune.objective import FineTuning, Learner, Views, balanced
from finetune.samples import Samples
from finetune.settings import Settings, settings_from
from finetune.stochastic_depth import StochasticDepth
from finetune.targets_class import Classification
from finetune.tasks import load_task
from finetune.train import Trace, Training
from pretrain import loop
from pretrain.gradient import global_gradient
from pretrain.metrics import read_metrics

pytest_plugins = ["test_finetune_kit"]
QUICK: dict[str, Any] = {"cpu": True, "min_steps": 12, "epochs": 1.0, "batch_size": 16, "lr": 1e-3}
ALL_ON = {"mixup": 0.5, "cutmix": 0.5, "drop_path": 0.3, "ema": 0.8, "patience": 9, "balance": True, "microbatch": 4}
TIMED = ("samples_per_second", "data_wait")


class Killed(BaseException):
    """Stands for SIGKILL in one process."""


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def encoder(export: Path) -> Encoder:
    return load_encoder(export)


@pytest.fixture(scope="module")
def samples(encoder: Encoder, digit_shards: tuple[Path, Path]) -> Samples:
    return load_task(*digit_shards, encoder).train.select(np.arange(80))


def training(encoder: Encoder, samples: Samples, trace: Trace | None = None, **settings: Any) -> Training:
    options = settings_from(QUICK | settings)
    accelerator = accelerator_for(options)
    start = lambda: copy.deepcopy(encoder).requires_grad_(True)  # noqa: E731
    return Training(start, samples, 10, 0, options, accelerator, trace=trace)


def weights(fitted: tuple[Encoder, LinearHead, dict[str, Any]]) -> list[torch.Tensor]:
    encoder, head, _ = fitted
    return [*encoder.state_dict().values(), *head.state_dict().values()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def losses(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMED} for line in read_metrics(run)]


def objective_of(encoder: Encoder, views: Views = Views(), **words: Any) -> FineTuning:  # noqa: B008
    learner = Learner(copy.deepcopy(encoder).requires_grad_(True), LinearHead(encoder.features, 10, seed=1))
    return FineTuning(learner, Classification([str(i) for i in range(10)]), views, **words)


@pytest.mark.parametrize("settings", [{}, ALL_ON], ids=["plain", "everything on"])
def test_killed_and_resumed_is_the_straight_run_and_the_one_in_memory(
    settings: dict[str, Any], encoder: Encoder, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings | {"checkpoint_every": 2}
    straight = training(encoder, samples, Trace(tmp_path / "straight"), **settings).fit(())
    assert equal(weights(straight), weights(training(encoder, samples, **settings).fit(())))
    step = loop.take_step
    for stop in (3, 8):

        def stopping(job: Any, batches: Any, stop: int = stop) -> Any:
            if job.state.step == stop:
                raise Killed
            return step(job, batches)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "take_step", stopping)
            with pytest.raises(Killed):
                training(encoder, samples, Trace(tmp_path / "killed"), **settings).fit(())
    resumed = training(encoder, samples, Trace(tmp_path / "killed"), **settings).fit(())
    assert equal(weights(resumed), weights(straight))
    assert resumed[2] == straight[2]
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    # A run that has ended is taken as it is.
    assert equal(weights(training(encoder, samples, Trace(tmp_path / "killed"), **settings).fit(())), weights(straight))


def test_another_fit_does_not_go_on_with_a_run(encoder: Encoder, samples: Samples, tmp_path: Path) -> None:
    training(encoder, samples, Trace(tmp_path), min_steps=2, epochs=0.01).fit(())
    with pytest.raises(UserError, match=r"optimizer.lr: 0.001 -> 0.002"):
        training(encoder, samples, Trace(tmp_path), min_steps=2, epochs=0.01, lr=2e-3).fit(())
    with pytest.raises(UserError, match="other data"):
        training(encoder, samples.select(np.arange(79)), Trace(tmp_path), min_steps=2, epochs=0.01).fit(())
    changed = copy.deepcopy(encoder)
    next(changed.parameters()).data.add_(1e-3)
    with pytest.raises(UserError, match="encoder_weights: "):
        training(changed, samples, Trace(tmp_path), min_steps=2, epochs=0.01).fit(())


def test_the_chosen_rate_is_not_chosen_again(
    encoder: Encoder, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"lr": None, "min_steps": 3, "epochs": 0.01}
    first = training(encoder, samples, Trace(tmp_path), **settings).fit((1e-4, 1e-3))[2]
    assert set(first["inner_accuracy"]) == {"0.0001", "0.001"}
    monkeypatch.setattr(Training, "_try", lambda *_: pytest.fail("tried again"))
    assert training(encoder, samples, Trace(tmp_path), **settings).fit((1e-4, 1e-3))[2] == first


def test_microbatches_make_the_gradient_of_the_whole_batch(encoder: Encoder, samples: Samples) -> None:
    found = []
    for microbatch in (None, 2):
        settings = settings_from(QUICK | ALL_ON | {"microbatch": microbatch, "clip": 1e9})
        objective = objective_of(encoder, Views.of(settings), weights=balanced(samples, 10))
        job = make_job(objective, samples, 1e-3, 0, settings, accelerator_for(settings))
        sums = global_gradient(job, iter(job.loader), 0.5)
        found.append(([p.grad for p in objective.parameters() if p.grad is not None], sums.loss, sums.count))
    (whole, loss, count), (split, split_loss, split_count) = found
    assert count == split_count == 16
    assert split_loss == pytest.approx(loss, rel=1e-5)
    assert_close(split, whole, atol=2e-6, rtol=2e-4)


def test_early_stopping_keeps_the_best_state_and_ends(
    encoder: Encoder, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float, list[torch.Tensor]]] = []
    from finetune import stopping

    judge = stopping.judge

    def judging(one: Encoder, head: nn.Module, valid: Samples, *rest: Any) -> Any:
        judged = judge(one, head, valid, *rest)
        seen.append((len(valid), judged.merit, [t.clone() for t in (*one.state_dict().values(),)]))
        return judged

    monkeypatch.setattr(stopping, "judge", judging)
    # So high a rate that it soon gets no better.
    fitted = training(encoder, samples, min_steps=40, lr=0.05, patience=2).fit(())
    best = fitted[2]["best"]
    number = best["step"] // 4 - 1
    assert fitted[2]["steps"] == best["step"] + 2 * 4 < 40
    assert len(seen) == number + 3
    assert all(count == 20 for count, _, _ in seen)
    assert seen[number][1] == max(merit for _, merit, _ in seen) == best["merit"]
    assert equal(list(fitted[0].state_dict().values()), seen[number][2])
    assert not equal(seen[number][2], seen[-1][2])


def test_what_is_frozen_costs_nothing_and_keeps_its_statistics(encoder: Encoder, samples: Samples) -> None:
    objective = objective_of(encoder)
    first, last = list(objective.learner.encoder.model.blocks.children())[:: len(encoder.model.blocks) - 1]
    objective.learner.encoder.requires_grad_(False)
    last.requires_grad_(True)
    norms = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4)])
    norms[0].requires_grad_(False)
    objective.learner.encoder.norms = norms
    grads: dict[str, bool] = {}
    for name, block in (("first", first), ("last", last)):
        block.register_forward_hook(lambda m, i, out, name=name: grads.__setitem__(name, out.requires_grad))
    settings = settings_from(QUICK)
    norms[1].requires_grad_(False)
    job = make_job(objective, samples, 1e-3, 0, settings, accelerator_for(settings))
    next(iter(job.loader))
    loop.take_step(job, iter(job.loader))
    assert grads == {"first": False, "last": True}
    norms[1].requires_grad_(True)
    objective.train()
    assert [norm.training for norm in norms] == [False, True]


def test_a_parameter_without_a_gradient_is_named(encoder: Encoder, samples: Samples) -> None:
    objective = objective_of(encoder)
    objective.learner.encoder.idle = nn.Linear(2, 2)
    settings = settings_from(QUICK)
    job = make_job(objective, samples, 1e-3, 0, settings, accelerator_for(settings))
    with pytest.raises(UserError, match=r"no gradient reaches encoder\.idle\.weight, encoder\.idle\.bias, on which"):
        loop.take_step(job, iter(job.loader))


def test_stochastic_depth_follows_the_keys_and_leaves_no_trace(encoder: Encoder, samples: Samples) -> None:
    own = copy.deepcopy(encoder).train()
    keys = samples.keys(0, 0, np.arange(64))
    batch = samples.batch(np.arange(64), keys)
    with torch.no_grad():
        plain = own(batch)
        depth = StochasticDepth(own, 0.5)
        depth.draw(keys)
        dropped = own(batch)
        depth.draw(keys[:8])
        assert_close(own(batch[:8]), dropped[:8])  # whatever else is in the batch
        changed = (dropped - plain).abs().amax(dim=1) > 1e-6
        assert int(changed.sum()) > 0
        assert_close(own.eval()(batch), plain)
        depth.remove()
        assert_close(own.train()(batch), plain)
    assert depth.keep[0] == 1.0
    assert depth.keep[-1] == 0.5
    with pytest.raises(UserError, match="drop_path; leave it out"):
        StochasticDepth(nn.Linear(2, 2), 0.1)  # type: ignore[arg-type]


def test_dropped_branches_keep_the_expectation(text_export: Path) -> None:
    own = load_encoder(text_export).train()
    depth = StochasticDepth(own, 0.5)
    depth.draw(torch.arange(20_000) * 7919)
    branches = torch.ones(20_000, len(depth.keep))
    means = (branches * depth.kept / torch.tensor(depth.keep)).mean(dim=0)
    assert len(depth.keep) == 2 * own.model.config.depth  # attention and MLP of each layer
    assert_close(means, torch.ones_like(means), atol=0.05, rtol=0)


def test_balanced_classes_count_alike(samples: Samples) -> None:
    few = samples.select(np.concatenate([np.flatnonzero(samples.labels == 0), np.flatnonzero(samples.labels == 1)[:2]]))
    counts = np.bincount(few.labels)
    given = balanced(few, 10).numpy()[:2]
    assert given[0] * counts[0] == pytest.approx(given[1] * counts[1])
    assert (given * counts).sum() == pytest.approx(len(few))


def test_options_that_do_not_fit_are_refused(encoder: Encoder, samples: Samples, text_export: Path) -> None:
    mixing = Views.of(Settings(mixup=0.5))
    with pytest.raises(UserError, match="for pictures"):
        objective_of(load_encoder(text_export), mixing)
    with pytest.raises(UserError, match="even number"):
        training(encoder, samples, mixup=0.5, batch_size=3).fit(())


def command(export: Path, shards: tuple[Path, Path], output: Path, *words: str) -> subprocess.Popen[str]:
    settings = [
        f"{name}={value}" for name, value in (QUICK | ALL_ON | {"min_steps": 60, "checkpoint_every": 5}).items()
    ]
    line = [sys.executable, "-m", "launch.cli", "finetune", str(export), str(shards[0]), "--test", str(shards[1])]
    line += ["--strategy", "full", "--labels-per-class", "8", "--output", str(output), *words, *settings]
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / f"step-{step:09d}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outcome(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("head.safetensors", "encoder/model.safetensors")}


@pytest.mark.slow
def test_killed_and_told_to_stop_from_outside_it_is_the_straight_model(
    export: Path, digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    straight = command(export, digit_shards, tmp_path / "straight")
    _, errors = straight.communicate(timeout=200)
    assert straight.returncode == 0, errors
    for number, step in ((signal.SIGKILL, 10), (signal.SIGTERM, 20)):
        process = command(export, digit_shards, tmp_path / "model")
        wait_for_step(tmp_path / "model.run", step)
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == (-9 if number == signal.SIGKILL else 75), errors
        assert "Traceback" not in errors
        assert not (tmp_path / "model").exists()
    assert json.loads((tmp_path / "model.run" / "status.json").read_text())["state"] == "preempted"
    last = command(export, digit_shards, tmp_path / "model")
    _, errors = last.communicate(timeout=200)
    assert last.returncode == 0, errors
    assert "resuming" in errors
    assert outcome(tmp_path / "model") == outcome(tmp_path / "straight")
    assert losses(tmp_path / "model" / "run") == losses(tmp_path / "straight" / "run")
    assert not list(tmp_path.glob("model.run*"))


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(export: Path, digit_shards: tuple[Path, Path], tmp_path: Path) -> None:
    for count in ("1", "2"):
        process = command(export, digit_shards, tmp_path / count, "--processes", count)
        _, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors
    one, two = losses(tmp_path / "1" / "run"), losses(tmp_path / "2" / "run")
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)
    from safetensors.torch import load_file

    for name in ("head.safetensors", "encoder/model.safetensors"):
        assert_close(load_file(tmp_path / "2" / name), load_file(tmp_path / "1" / name), atol=1e-4, rtol=1e-3)
