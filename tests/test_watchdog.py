"""Laws of the watchdog: it hears what stands still, not what is slow, compiles, saves or was stopped itself."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pretrain_kit import recipe

from pretrain import loop, watchdog
from pretrain.exits import HUNG
from pretrain.loop import train
from pretrain.watchdog import Watchdog


class Left(BaseException):
    """Stands for the end of the process."""


def hearing(folder: Path, said: list[str], factor: float = 5.0, least: float = 0.1) -> Watchdog:
    return Watchdog(lambda: folder, factor, least, 3, said.append, lambda status: said.append(str(status)))


def test_stacks_name_the_place_where_it_stands(tmp_path: Path) -> None:
    said: list[str] = []

    def standing_still() -> None:
        time.sleep(1.0)

    with hearing(tmp_path, said).watching() as dog:
        dog.step(0.01)
        standing_still()
    stacks = (tmp_path / "process-3.txt").read_text()
    assert "standing_still" in stacks
    assert "process 3 stood still in a step" in stacks
    assert said == [stacks.splitlines()[0].partition(" ")[2], str(HUNG)]


def test_patience_follows_the_steps_and_what_is_done(tmp_path: Path) -> None:
    dog = hearing(tmp_path, [], factor=5.0, least=2.0)
    assert dog.limit == 20.0, "before the first step ends: it compiles"
    dog.step(300.0)
    assert dog.limit == 2.0, "what the first took says nothing"
    for _ in range(9):
        dog.step(1.0)
    dog.step(100.0)
    assert dog.limit == 5.0, "a median does not mind one slow step"
    with dog.during("an evaluation"):
        assert dog.limit == 50.0
    assert dog.limit == 5.0


def test_it_is_quiet_while_there_are_steps_and_not_at_all_with_factor_0(tmp_path: Path) -> None:
    said: list[str] = []
    with hearing(tmp_path, said).watching() as dog:
        for _ in range(20):
            time.sleep(0.02)
            dog.step(0.02)
        with dog.during("a save"):
            time.sleep(0.3)
    with hearing(tmp_path, said, factor=0.0).watching():
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    assert said == []


def test_time_that_the_process_did_not_live_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    clock = {"jump": 0.0}
    real = time.monotonic
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: real() + clock["jump"])
    with hearing(tmp_path, said, least=0.5).watching() as dog:
        dog.step(0.01)
        clock["jump"] = 3600.0
        time.sleep(0.2)
        dog.step(0.01)
    assert said == []


def test_a_run_that_stands_still_says_so(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, done = loop.take_step, threading.Event()

    def sleeping(setup: Any, batches: Any) -> Any:
        if setup.state.step == 6:
            assert done.wait(60)
            raise Left
        return step(setup, batches)

    def leave(status: int) -> None:
        assert status == HUNG
        done.set()

    monkeypatch.setattr(loop, "take_step", sleeping)
    monkeypatch.setattr(loop, "Watchdog", lambda *words: Watchdog(*words, leave=leave))
    settings = {"watch.hang_seconds": 5.0, "watch.hang_factor": 2.0}
    with pytest.raises(Left):
        train(recipe("mae", digits / "train", settings), tmp_path / "run")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("hung", 6)
    assert "sleeping" in (tmp_path / "run" / "stacks" / "step-000000006" / "process-0.txt").read_text()
