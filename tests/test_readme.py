"""The README's commands are commands, its recipes exist, and CI runs its test line."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from launch.cli import build_parser
from pretrain.recipe_file import FOLDER

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in LINES if line.startswith("headwater ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_headwater_command_parses(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    arguments, rest = build_parser().parse_known_args(words)
    assert hasattr(arguments, "command")
    assert all("=" in word and not word.startswith("-") for word in rest)


def test_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 8


def test_the_two_commands_come_first() -> None:
    assert LINES[0].endswith("headwater quickstart")
    assert LINES[1].endswith("pytest")
    assert README.index("headwater quickstart") < README.index("docs/quickstart.png")


def test_ci_takes_its_test_command_from_the_readme() -> None:
    extract = next(line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("test_command="))
    found = subprocess.run(
        ["bash", "-c", f'{extract}\necho "$test_command"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == LINES[1]


def test_readme_names_every_recipe() -> None:
    for recipe in FOLDER.glob("*.yaml"):
        assert f"`{recipe.stem}`" in README


def test_the_files_it_links_to_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
