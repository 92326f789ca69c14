"""Settings: as they come from a command line, and what a mistake is answered with."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import UserError
from finetune.__main__ import settings_of
from finetune.features import settled
from finetune.rates import ADAPTERS, FIXED, FIXED_ADAPTERS, SHARES, learning_rates
from finetune.settings import Settings, settings_from
from finetune.strategies import strategy_from
from launch.cli import main
from pretrain.precision import best

pytest_plugins = ["test_finetune_kit"]


@pytest.mark.parametrize("word", ["no", "bf16", "fp16", "auto"])
def test_every_precision_can_be_written_on_a_command_line(word: str) -> None:
    # YAML 1.1 reads `no` as False.
    assert settings_from(settings_of([f"precision={word}"])).precision == word


def test_auto_is_what_pre_training_would_take() -> None:
    chosen = best(torch.device("cpu"))
    assert settled(Settings(precision="auto", cpu=True)).precision == chosen
    assert settled(Settings(precision="fp16", cpu=True)).precision == "fp16"
    assert settled(Settings(cpu=True)).precision is None


def test_a_precision_that_is_none_is_refused() -> None:
    for wrong in (True, "int8"):
        with pytest.raises(UserError, match="setting precision="):
            settings_from({"precision": wrong})


@pytest.mark.parametrize(("wrong", "near"), [("epoch", "epochs"), ("layerdecay", "layer_decay")])
def test_an_unknown_setting_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=f"no setting '{wrong}'.*{near}"):
        settings_from({wrong: 1})


@pytest.mark.parametrize(("wrong", "near"), [("lineer", "linear"), ("Full", "full")])
def test_an_unknown_strategy_names_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UserError, match=f"no strategy '{wrong}'; did you mean '{near}'"):
        strategy_from(wrong)


@pytest.mark.parametrize("pattern", [r".*\.qkv", "[ab]*", "*", r"blocks\.[0-5]\.(attn|mlp)\..*", "a: b: c"])
def test_regular_expressions_reach_their_setting_as_they_are(pattern: str) -> None:
    if pattern == "[ab]*":  # valid YAML would have been a list
        assert settings_of([f"target_modules={pattern}"]) == {"target_modules": pattern}
    assert settings_from(settings_of([f"target_modules={pattern}"])).target_modules == pattern


def test_seeds_of_a_command_line_begin_where_it_says(
    export: Path, digit_shards: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", str(export), str(digit_shards[0]), "--test", str(digit_shards[1]), "--labels-per-class", "2"]
    told = {}
    for name, more in (("first", ["--seed", "3"]), ("two", ["--seed", "3", "--seeds", "2"]), ("other", [])):
        assert main([*words, "--json", *more]) == 0
        told[name] = json.loads(capsys.readouterr().out)
    assert [told[name]["seeds"] for name in told] == [[3], [3, 4], [0]]
    same = "accuracy", "seed"
    assert [told["two"]["runs"][0][key] for key in same] == [told["first"]["runs"][0][key] for key in same]


@pytest.mark.parametrize(
    ("optimizer", "trained", "adapters"),
    [
        ({"name": "adamw", "lr": 1e-3}, [1e-3 * share for share in SHARES], [1e-3 * share for share in ADAPTERS]),
        ({"name": "muon", "lr": 4e-3}, [4e-3 * share for share in SHARES], [4e-3 * share for share in SHARES]),
        ({"name": "lars", "lr": 0.3}, FIXED, FIXED_ADAPTERS),
    ],
)
def test_rates_follow_from_the_pre_training(
    optimizer: dict[str, Any], trained: Sequence[float], adapters: Sequence[float]
) -> None:
    info = {"recipe": {"optimizer": optimizer, "train": {"batch_size": 32}}}
    assert learning_rates(info) == pytest.approx(tuple(trained))
    assert learning_rates(info, ADAPTERS, FIXED_ADAPTERS) == pytest.approx(tuple(adapters))
