"""Laws of state, for every objective on pictures: a resumed run is the straight run bit for bit, a step with bad
numbers changes nothing, and an export brings the right encoder and all that a continued run needs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_kit import NORMS, PICTURES, recipe
from safetensors.torch import load_file
from test_resume import Killed, assert_same

from pretrain import loop
from pretrain.loop import take_step, train
from pretrain.reload import load_objective
from pretrain.setup import prepare

SHORT = {"train.steps": 5, "train.batch_size": 8, "watch.checkpoint_every": 2, "watch.log_every": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PICTURES},
    "simclr, accumulated": ("simclr", {"train.microbatch": 2} | NORMS),
    "moco, accumulated": ("moco", {"train.microbatch": 2} | NORMS),
    "dinov2, accumulated": ("dinov2", {"train.microbatch": 2}),
    "dino, accumulated": ("dino", {"train.microbatch": 2}),
    "mixture, accumulated": ("mixture", {"train.microbatch": 4}),
}
"""What each is and how it is set."""
OFTEN = ("byol", "ibot", "moco, accumulated", "mixture, accumulated")
"""Cases that run by default; between them they hold every kind of state."""


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in OFTEN else [pytest.mark.slow]) for c in CASES])
def test_resumed_is_straight(case: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, settings = CASES[case]
    chosen = recipe(name, digits / "train", SHORT | settings)
    train(chosen, tmp_path / "straight")
    step = loop.take_step

    def stopping(setup: Any, batches: Any) -> Any:
        if setup.state.step == 3:
            raise Killed
        return step(setup, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", stopping)
        with pytest.raises(Killed):
            train(chosen, tmp_path / "run")
    train(chosen, tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "straight")
    # The export: the encoder that the objective says, and all that a continued run needs.
    objective, _ = load_objective(tmp_path / "run" / "export")
    exported = dict(objective.exported().state_dict())
    saved = dict(load_file(tmp_path / "run" / "export" / "model.safetensors"))
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[n], saved[n]) for n in saved)


@pytest.mark.parametrize("microbatch", [None, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PICTURES)
def test_bad_numbers_change_nothing(name: str, microbatch: int | None, digits: Path, tmp_path: Path) -> None:
    norms = NORMS if name in ("simclr", "moco", "byol", "barlow_twins", "vicreg", "simmim", "supervised") else {}
    setup = prepare(recipe(name, digits / "train", SHORT | norms | {"train.microbatch": microbatch}), tmp_path)
    batches = iter(setup.loader)
    take_step(setup, batches)
    before = {n: t.clone() for n, t in setup.state.objective.state_dict().items()}
    moments = [
        t.clone() for state in setup.state.optimizer.state.values() for t in state.values() if torch.is_tensor(t)
    ]
    parameter = next(p for p in setup.state.objective.parameters() if p.requires_grad)
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)
    sums = take_step(setup, batches)
    hook.remove()
    assert not sums.finite
    after = setup.state.objective.state_dict()
    assert [n for n in before if not torch.equal(before[n], after[n])] == []
    found = [t for state in setup.state.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert all(torch.equal(a, b) for a, b in zip(moments, found, strict=True))
    assert take_step(setup, batches).finite
    assert any(not torch.equal(before[n], t) for n, t in setup.state.objective.state_dict().items())
