"""Each accelerate configuration is one that accelerate's own parser takes, with nothing left to a user's default."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from data.errors import UserError
from launch.processes import CONFIGS, launch_words
from pretrain.accelerator import as_launched, make_accelerator
from pretrain.recipe_file import load_recipe

FILES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path: Path) -> None:
    config = load_config_from_file(str(path))
    # Precision is the recipe's affair; a configuration must not change it behind its back.
    assert config.mixed_precision == "no"
    assert (config.num_machines == 1) == (path.stem != "nodes")
    assert (config.num_processes == 1) == (path.stem == "single")


def test_there_are_some() -> None:
    assert {path.stem for path in FILES} >= {"single", "ddp", "fsdp2", "cpu", "nodes"}


def environment(path: Path) -> dict[str, str]:
    """What `accelerate launch` gives its processes with this configuration."""
    words = ["--config_file", str(path), "--num_processes", "2", "-m", "pretrain"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize(("name", "shards"), [("ddp", False), ("fsdp2", True), ("nodes", False)])
def test_a_configuration_with_fsdp_shards(name: str, shards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = environment(CONFIGS / f"{name}.yaml")
    assert (given.get("ACCELERATE_USE_FSDP") == "true") == shards
    monkeypatch.setenv("ACCELERATE_USE_FSDP", given.get("ACCELERATE_USE_FSDP", "false"))
    assert as_launched(load_recipe("mae_cifar10", [])).train.shard == shards


def test_what_does_not_shard_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"ddp\.yaml"):
        make_accelerator(load_recipe("mae_cifar10", []), tmp_path)


@pytest.mark.parametrize(("settings", "config"), [([], "ddp"), (["train.shard=true"], "fsdp2")])
def test_the_right_one_is_passed(settings: list[str], config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    words, _ = launch_words(8, ["mae_cifar10", *settings])
    assert Path(words[words.index("--config_file") + 1]).stem == config
