"""Results and models written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finetune.model import claim, publish
from finetune.results import write_results


class Savable(Protocol):
    """A task model, an ensemble."""

    def save(self, folder: Path) -> None:
        """Write everything into `folder`."""


@dataclass(frozen=True)
class Folder:
    """An output that appears under its name when the block that writes it ends well."""

    hidden: Path
    """Where it is written."""

    def save(self, model: Savable, results: dict[str, Any]) -> None:
        """A model and its `results.json`."""
        model.save(self.hidden)
        write_results(self.hidden / "results.json", results)


@contextmanager
def written(output: str | Path | None, overwrite: bool) -> Iterator[Folder | None]:
    """A folder to write into, published as `output` after the block; None where no output is wanted.

    Raises:
        UserError: `output` is taken; said before the block begins.
    """
    if output is None:
        yield None
        return
    hidden = claim(Path(output).expanduser(), overwrite)
    try:
        yield Folder(hidden)
        publish(hidden, Path(output).expanduser())
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
