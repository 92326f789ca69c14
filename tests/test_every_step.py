"""The law of resume at every step of a run, by induction: from the checkpoint of step k, one step makes step k + 1.

One run is left alone and saved at each of its 40 steps. Another process's worth of state then goes, in a random order,
to each of those checkpoints and takes one step from it: weights, optimiser, averages, buffers, counts and metrics must
be the next checkpoint's, bit for bit. Whatever a checkpoint forgets is then left over from some other step, and shows.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_kit import BASES, TEXTS, recipe
from torch import Tensor

from pretrain.checkpoint import Retention, checkpoint_name
from pretrain.gradient import Sums
from pretrain.loop import take_step
from pretrain.saver import Saver
from pretrain.setup import Setup, prepare

STEPS = 40
QUICK = ("mae", "next_token", "moco", "dinov2")
CASES = [
    pytest.param(name, workers, parts, marks=() if (name, workers, parts) == ("mae", 0, 3) else pytest.mark.slow)
    for name in BASES
    for workers, parts in ((0, 1), (0, 3), (2, 3))
    if workers == 0 or name in QUICK
]


def measured(sums: Sums) -> tuple[Any, ...]:
    return (sums.loss, sums.count, sums.norm, sums.metrics)


def everything(setup: Setup) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of all tensors of the state, and the rest of it."""
    snapshot = setup.state.snapshot(setup.recipe, setup.data.facts)
    tensors = {f"{kind}/{name}": t.clone() for kind, part in snapshot.tensors.items() for name, t in part.items()}
    return tensors, snapshot.state


def straight(setup: Setup, folder: Path) -> Iterator[tuple[tuple[Any, ...], dict[str, Tensor], dict[str, Any]]]:
    saver, batches = Saver(folder, Retention(STEPS + 1), background=False), iter(setup.loader)
    for step in range(STEPS):
        saver.save(step, setup.state.snapshot(setup.recipe, setup.data.facts))
        assert saver.problem is None
        yield measured(take_step(setup, batches)), *everything(setup)


@pytest.mark.parametrize(("objective", "workers", "parts"), CASES)
def test_a_checkpoint_of_any_step_makes_the_next(
    objective: str,
    workers: int,
    parts: int,
    digits: Path,
    sentences: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # that checkpoints outlive a crash is tested elsewhere
    data = sentences if objective in TEXTS else digits / "train"
    settings = {"train.steps": STEPS, "train.batch_size": 12, "train.microbatch": 12 // parts, "train.ema": 0.9}
    chosen = recipe(objective, data, settings | {"data.workers": workers})
    left_alone = list(straight(prepare(chosen, tmp_path), tmp_path / "checkpoints"))
    setup = prepare(chosen, tmp_path)
    for step in random.Random(0).sample(range(STEPS), STEPS if workers == 0 else STEPS // 4):
        setup.state.restore(tmp_path / "checkpoints" / checkpoint_name(step), setup.recipe, setup.data.facts)
        setup.loader.position = setup.state.position
        sums = measured(take_step(setup, iter(setup.loader)))
        tensors, rest = everything(setup)
        expected, tensors_expected, rest_expected = left_alone[step]
        assert sums == expected, step
        assert rest == rest_expected, step
        assert tensors.keys() == tensors_expected.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], tensors_expected[name])] == [], step
