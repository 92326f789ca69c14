"""Laws of stopping: asked in any way, at any moment, a run saves, says so, and goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretrain_kit import recipe
from test_resume import assert_same

from data.errors import UserError
from pretrain import loop, preemption, pretraining, saver
from pretrain.clock import process_age, seconds_of
from pretrain.exits import REQUEUE
from pretrain.loop import train
from pretrain.preemption import Preempted, Preemption

SETTINGS = {"data.validation": 0.1, "watch.evaluate_every": 5, "watch.evaluate_samples": 64, "train.microbatch": 8}


def raise_signal(number: signal.Signals) -> Callable[..., None]:
    return lambda *_: os.kill(os.getpid(), number)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    take = loop.take_step

    def acting(setup: Any, batches: Any) -> Any:
        if setup.state.step == step:
            act()
        return take(setup, batches)

    monkeypatch.setattr(loop, "take_step", acting)


def during(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], None]) -> None:
    """Act once while `owner.name` runs."""
    real, done = getattr(owner, name), []

    def acting(*words: Any, **named: Any) -> Any:
        if not done:
            done.append(act())
        return real(*words, **named)

    monkeypatch.setattr(owner, name, acting)


@pytest.fixture(scope="module")
def straight(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("straight") / "run"
    train(recipe("mae", digits / "train", SETTINGS), run)
    return run


def status(run: Path) -> dict[str, Any]:
    said: dict[str, Any] = json.loads((run / "status.json").read_text())
    return said


WAYS = ("SIGTERM", "SIGUSR1", "STOP file", "evaluation", "save")


@pytest.mark.parametrize("way", WAYS)
def test_asked_to_stop_it_saves_and_goes_on(
    way: str, straight: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, terminate = tmp_path / "run", raise_signal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(preemption, "_LOOK_SECONDS", 0.0)
        if way in ("SIGTERM", "SIGUSR1"):
            at_step(patch, 6, raise_signal(signal.Signals[way]))
        elif way == "STOP file":
            at_step(patch, 6, (run / "STOP").touch)
        elif way == "evaluation":
            during(patch, pretraining, "evaluate", terminate)
        else:
            during(patch, saver.Saver, "_copy", terminate)
        with pytest.raises(Preempted) as stop:
            train(recipe("mae", digits / "train", SETTINGS), run)
    # In an evaluation at once, and it is made up for; else after the step in which it is agreed.
    step = {"evaluation": 5, "save": 5}.get(way, 7)
    assert status(run) | {"time": 0} == status(run) | {"time": 0, "state": "preempted", "step": step}
    assert status(run)["reason"] == (way if way in preemption.REASONS else "SIGTERM")
    assert (run / "checkpoints" / "LATEST").read_text() == f"step-{step:09d}\n"
    assert stop.value.status == (0 if way == "STOP file" else REQUEUE)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    train(recipe("mae", digits / "train", SETTINGS), run)
    assert_same(run, straight)


def test_before_the_first_step_it_leaves_at_once(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 0, raise_signal(signal.SIGTERM))
    with pytest.raises(Preempted) as stop:
        train(recipe("mae", digits / "train"), tmp_path / "run")
    assert (stop.value.status, status(tmp_path / "run")["state"]) == (REQUEUE, "preempted")
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_second_signal_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", sent.append)
    asked = Preemption(tmp_path / "STOP")
    asked.started = True
    with asked.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert (asked.asked(), sent) == ("SIGTERM", [])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert sent == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    # A launcher passes on what a scheduler has sent to everybody already: that is one request.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with (again := Preemption(tmp_path / "STOP")).listening():
        again.started = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(sent) == 1
    monkeypatch.setattr(preemption, "ECHO_SECONDS", 0.0)
    with again.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(sent) == 2


def test_the_time_limit_leaves_room_for_a_save(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "process_age", lambda _: 100.0)
    asked = Preemption(tmp_path / "STOP", limit=200.0)
    assert asked.asked() is None
    asked.save_seconds = 60.0
    assert asked.asked() is None, "100 + 1.5 * 60 + 5 < 200"
    asked.save_seconds = 64.0
    assert asked.asked() == "max_time"
    assert Preemption(tmp_path / "STOP", limit=1.0, main=False).asked() is None, "one clock decides"
    with pytest.raises(Preempted) as stop:
        train(recipe("mae", digits / "train", {"watch.max_time": "0:01:44"}), tmp_path / "run")
    assert (stop.value.reason, stop.value.status) == ("max_time", REQUEUE)
    assert status(tmp_path / "run")["step"] >= 1


def test_times_as_schedulers_write_them(digits: Path) -> None:
    assert seconds_of("23:50:00") == 85_800
    assert seconds_of("1-12:00:30") == 129_630
    assert recipe("mae", digits, {"watch.max_time": 85_800}).watch.max_time == 85_800  # YAML 1.1 reads 23:50:00 so
    for wrong in ("23:50", "soon", -5, "0:00:00"):
        with pytest.raises(UserError, match=r"watch\.max_time"):
            recipe("mae", digits, {"watch.max_time": wrong})


def test_the_age_of_a_process_is_its_own() -> None:
    began = process_age(os.getpid())
    time.sleep(0.2)
    assert 0.1 < process_age(os.getpid()) - began < 5.0
    assert process_age(2**22 + 1) == 0.0
