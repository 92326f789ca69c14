"""Laws of the house: imports follow the arrows, help is quick, nothing big is tracked."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

ALLOWED = {
    "data": {"data"},
    "pretrain": {"data", "pretrain"},
    "finetune": {"data", "pretrain", "finetune"},
    "launch": {"data", "pretrain", "finetune", "launch"},
}
FILES = [path for name in ALLOWED for path in sorted((REPOSITORY / name).rglob("*.py"))]


def imported(source: str, package: str) -> set[str]:
    """Top-level packages that a module imports, at its top or inside functions, by statement or by name.

    Args:
        package: what a relative import starts from.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(package if node.level else (node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {str(a.value).partition(".")[0] for a in node.args if isinstance(a, ast.Constant)}
    return found


def test_the_walk_sees_every_kind_of_import() -> None:
    source = "import launch.cli as c\ndef f():\n    from finetune.run import x\n    import_module('pretrain.loop')\n"
    assert imported(source + "from . import y\n", "data") == {"launch", "finetune", "pretrain", "data"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(REPOSITORY).parts[0]
    ours = imported(path.read_text(encoding="utf-8"), package) & set(ALLOWED)
    assert ours <= ALLOWED[package], f"{path.name} imports {ours - ALLOWED[package]}"


def test_every_module_can_be_imported() -> None:
    for path in FILES:
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        if parts[-1] == "__main__":
            continue
        module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        assert Path(module.__file__ or "").resolve() == path.resolve()


def test_every_public_name_of_data_exists() -> None:
    data = importlib.import_module("data")
    for name in data.__all__:
        assert getattr(data, name).__name__ == name
    with pytest.raises(AttributeError, match="Loadr"):
        data.Loadr  # noqa: B018


def test_packages_are_listed_for_installation() -> None:
    """setuptools takes the packages by name: a new folder that is forgotten would be missing once installed."""
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    found = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in FILES}
    assert found == set(project["tool"]["setuptools"]["packages"])


def test_help_answers_at_once() -> None:
    command = [sys.executable, "-m", "launch.cli", "--help"]
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - begun)
    assert "pretrain" in answer.stdout
    assert min(seconds) < 0.5


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; from launch.cli import build_parser; build_parser().format_help(); print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "timm", "transformers", "lightly", "accelerate", "webdataset", "PIL", "pydantic"}
    assert not heavy & set(answer.stdout.split())


def test_no_big_file_is_tracked() -> None:
    answer = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False)
    if answer.returncode:
        pytest.skip("not a git checkout")
    paths = [REPOSITORY / name for name in answer.stdout.decode().split("\0") if name]
    assert paths
    assert [path for path in paths if path.is_file() and path.stat().st_size > 2**20] == []
