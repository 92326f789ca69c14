"""Laws of sharding: it changes where numbers lie, not which; checkpoints pass between any two ways of holding them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_kit import TEXTS, two_workers, write_recipe
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "mae": {"train.ema": 0.9, "train.microbatch": 4, "train.clip": 0.5, "data.validation": 0.05},
    "next_token": {"train.ema": 0.9, "optimizer": {"name": "muon", "lr": 1e-3}},
    "moco": {"train.microbatch": 2, "data.validation": 0.05},
    "byol": {"optimizer": {"name": "lars", "lr": 0.1}},
}
PARAMETERS = ["mae", *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "mae")]
Observed = Callable[[str], list[dict[str, Any]]]
KINDS = ("plain", "sharded")
SOURCES = ("plain", "sharded", "plain alone", "sharded alone")


@pytest.fixture(scope="module")
def observed(digits: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """What each of two processes observed in a case; they are started when it is first asked for."""

    @functools.cache
    def both(case: str) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("sharded")
        data = sentences if case in TEXTS else digits / "train"
        path = write_recipe(folder / f"{case}.yaml", case, data, CASES[case])
        return two_workers("sharded_worker.py", folder, path)

    return both


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("case", PARAMETERS)
def test_sharding_changes_no_loss_and_no_gradient(case: str, observed: Observed) -> None:
    for each in observed(case):
        for part in ("first", "straight"):
            for ours, theirs in zip(each[f"sharded {part}"], each[f"plain {part}"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4)
        assert each["sharded evaluation"].keys() == each["plain evaluation"].keys()
        for name, value in each["plain evaluation"].items():
            assert each["sharded evaluation"][name] == pytest.approx(value, rel=1e-3, abs=0.05), name


@pytest.mark.parametrize("case", PARAMETERS)
def test_each_process_holds_its_share(case: str, observed: Observed) -> None:
    first, second = observed(case)
    assert first["local"] + second["local"] == first["global"]
    assert second["local"] > 0.4 * first["global"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("case", PARAMETERS)
def test_a_checkpoint_of_any_kind_is_read_by_any_other(case: str, source: str, kind: str, observed: Observed) -> None:
    for each in observed(case):
        saved = each[f"{source.removesuffix(' alone')} saved"]
        assert {"model", "optimizer"} <= {name.partition("/")[0] for name in saved}
        assert same(each[f"{source} -> {kind} loaded"], saved)
        origin = source.removesuffix(" alone")
        for ours, theirs in zip(each[f"{source} -> {kind}"], each[f"{origin} straight"], strict=False):
            assert ours == pytest.approx(theirs, rel=1e-4)
        if kind == origin:  # the same sums in the same order
            assert each[f"{source} -> {kind}"] == each[f"{origin} straight"][: len(each[f"{source} -> {kind}"])]
            assert same(each[f"{source} -> {kind} end"], each[f"{origin} end"])
