"""`train.precision=auto`: what the device is fast at, decided once, kept when the run goes on elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from pretrain_kit import recipe

from data.errors import UserError
from pretrain import checkpoint, precision
from pretrain.loop import train
from pretrain.precision import best, caution, multiplies_bf16
from pretrain.recipe_file import FOLDER, load_recipe
from pretrain.setup import prepare

CPU = torch.device("cpu")
AUTO = {"train.precision": "auto", "train.steps": 8}


def with_units(monkeypatch: pytest.MonkeyPatch, avx512: bool = False, amx: bool = False) -> None:
    """Pretend that this is a new process on a CPU that has, or lacks, units for bfloat16."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


def test_a_cpu_takes_bf16_only_where_it_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for avx512, amx in ((False, False), (True, False), (False, True), (True, True)):
        with_units(monkeypatch, avx512, amx)
        assert multiplies_bf16(CPU) is (avx512 or amx)
        assert best(CPU) == ("bf16" if avx512 or amx else "no")
        assert (caution("bf16", CPU) is None) is (avx512 or amx)
        assert caution("no", CPU) is None


def test_other_devices_stay_in_float32() -> None:
    assert best(torch.device("mps")) == "no"


def precision_of(run: Path) -> str:
    return str(yaml.safe_load((run / "recipe.yaml").read_text())["train"]["precision"])


@pytest.mark.parametrize("begun", [False, True])
def test_auto_is_decided_once_and_kept_on_another_machine(
    begun: bool, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    word, other = ("bf16", "no") if begun else ("no", "bf16")
    chosen = recipe("mae", digits / "train", AUTO)
    with_units(monkeypatch, avx512=begun)
    train(chosen, tmp_path / "whole")
    assert precision_of(tmp_path / "whole") == word
    stopped = tmp_path / "run"
    (stopped / "checkpoints").mkdir(parents=True)
    (tmp_path / "whole/checkpoints" / "step-000000004").rename(stopped / "checkpoints/step-000000004")
    assert capfd.readouterr().err.count("this run began") == 0
    with_units(monkeypatch, avx512=not begun)
    train(chosen, stopped)
    said = capfd.readouterr()
    assert f"began with train.precision={word}" in said.err
    assert f"would take {other}" in said.err
    assert ("does not multiply bfloat16" in said.out + said.err) is begun
    assert precision_of(stopped) == word
    last = [checkpoint.newest(run / "checkpoints", print) for run in (tmp_path / "whole", stopped)]
    assert all(path is not None and path.name == "step-000000008" for path in last)
    first, second = (checkpoint.read_tensors(path, "model") for path in last if path is not None)
    assert all(first.whole(name).equal(second.whole(name)) for name in first.names)
    # A path to go on from decides, too.
    found = prepare(chosen, tmp_path / "new", str(stopped / "checkpoints/step-000000004"))
    assert found.recipe.train.precision == word
    with_units(monkeypatch, avx512=not begun)
    assert prepare(chosen, tmp_path / "new").recipe.train.precision == other


def test_another_precision_than_the_run_s_is_refused(digits: Path, tmp_path: Path) -> None:
    settings = {"train.steps": 4, "train.precision": "no"}
    train(recipe("mae", digits / "train", settings), tmp_path / "run")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match=r"train\.precision: no -> bf16"):
        train(recipe("mae", digits / "train", settings | {"train.precision": "bf16"}), tmp_path / "run")


def test_slow_bf16_is_said(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with_units(monkeypatch)
    train(recipe("mae", digits / "train", {"train.steps": 4, "train.precision": "bf16"}), tmp_path / "run")
    said = capfd.readouterr()
    assert "train.precision=bf16 on a cpu that does not multiply bfloat16" in said.out + said.err


def test_recipes_that_fit_a_cpu_leave_the_precision_to_the_machine() -> None:
    for name in ("mlm_small", "replaced_token_small", "next_token_1m", "next_token_10m"):
        assert load_recipe(name).train.precision == "auto", FOLDER / name
    assert precision.best(CPU) in ("no", "bf16")
