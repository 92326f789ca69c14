"""Each accelerate configuration is one that accelerate's own parser takes, with nothing left to a user's default."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from launch.processes import CONFIGS

FILES = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_it(path: Path) -> None:
    config = load_config_from_file(str(path))
    # Precision is the recipe's affair; a configuration must not change it behind its back.
    assert config.mixed_precision == "no"
    assert (config.num_machines == 1) == (path.stem != "nodes")
    assert (config.num_processes == 1) == (path.stem == "single")


def test_there_are_some() -> None:
    assert {path.stem for path in FILES} >= {"single", "ddp", "cpu", "nodes"}
