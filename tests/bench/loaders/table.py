"""Results as Markdown."""

from __future__ import annotations

import platform
from importlib import metadata

_PACKAGES = ("torch", "torchvision", "webdataset", "litdata", "mosaicml-streaming", "pillow", "simplejpeg", "numpy")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first column to the left, the others to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def versions() -> str:
    """Python, machine and packages, in one line."""
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in _PACKAGES)
    return f"Python {platform.python_version()}, {platform.machine()}, {packages}"
