"""When a run compiles its views, and that nothing depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pretrain_kit import recipe
from test_resume import Killed, assert_same

from data.errors import UserError
from pretrain import loop
from pretrain import setup as setting
from pretrain.loop import train
from pretrain.setup import prepare
from pretrain.views import cpu
from pretrain.views.passes import can_fuse, compiled, fuse_views, fused


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """As it was before."""
    yield
    fuse_views(False)


@pytest.mark.parametrize(
    ("asked", "steps", "compiler", "compiles"),
    [
        (None, 12, True, False),
        (None, 10_000_000, True, True),
        (None, 10_000_000, False, False),
        (True, 12, True, True),
        (False, 10_000_000, True, False),
    ],
)
def test_views_are_compiled_where_it_pays(
    asked: bool | None, steps: int, compiler: bool, compiles: bool, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting, "can_fuse", lambda: compiler)
    prepare(recipe("simclr", digits / "train", {"train.compile_views": asked, "train.steps": steps}), Path("unused"))
    assert fused() == compiles


def test_no_compiler_is_said_where_one_is_asked_for(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not can_fuse()
    with pytest.raises(UserError, match=r"compile_views=true needs a C\+\+ compiler"):
        prepare(recipe("simclr", digits / "train", {"train.compile_views": True}), Path("unused"))


@pytest.mark.slow
@pytest.mark.skipif(not can_fuse(), reason="there is no C++ compiler here")
def test_a_run_goes_on_with_compiled_views(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is that of a run which was eager throughout, bit for bit."""
    short = {"train.steps": 5, "train.batch_size": 8, "watch.checkpoint_every": 2}
    train(recipe("simclr", digits / "train", short), tmp_path / "straight")
    step, made = loop.take_step, []

    def stopping(setup: Any, batches: Any) -> Any:
        if setup.state.step == 3:
            raise Killed
        return step(setup, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        with pytest.raises(Killed):
            train(recipe("simclr", digits / "train", short), tmp_path / "run")
    monkeypatch.setattr(cpu, "PIECE", 4 * 16 * 16)
    monkeypatch.setattr(cpu, "compiled", lambda kind: made.append(kind) or compiled(kind))
    train(recipe("simclr", digits / "train", short | {"train.compile_views": True}), tmp_path / "run")
    assert made
    assert_same(tmp_path / "run", tmp_path / "straight")
