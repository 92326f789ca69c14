"""One cell of the study: a way of using an encoder, a label budget, a seed. Finished cells outlive any kill."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.files import append, sync, write_atomically
from finetune.evidence import wilson

Weights = Literal["pre-trained", "second", "untrained", "none"]
FORMAT = 1


@dataclass(frozen=True)
class Arm:
    """A strategy and the weights it begins from."""

    strategy: str
    weights: Weights

    @property
    def name(self) -> str:
        """What it is called in results: the strategy, and its weights where they are not the first encoder's."""
        return self.strategy if self.weights in ("pre-trained", "none") else f"{self.strategy}, {self.weights}"

    @property
    def pretrained(self) -> bool:
        """Whether it uses pre-trained weights; the others are controls."""
        return self.weights in ("pre-trained", "second")


@dataclass(frozen=True)
class Cell:
    """What one cell gave."""

    arm: str
    labels: int
    seed: int
    correct: NDArray[np.bool_]
    """(items,) whether each test item was classified rightly."""
    macro_f1: float
    seconds: float
    """Fitting and judging, learning-rate trials and feature extraction included."""
    chosen: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def key(self) -> tuple[str, int, int]:
        return self.arm, self.labels, self.seed

    def encoded(self) -> dict[str, Any]:
        """As a JSON object; the test items are bits."""
        bits = base64.b64encode(np.packbits(self.correct).tobytes()).decode()
        facts = {"arm": self.arm, "labels": self.labels, "seed": self.seed, "accuracy": self.accuracy}
        facts |= {"macro_f1": self.macro_f1, "seconds": round(self.seconds, 3), "chosen": self.chosen}
        return facts | {"items": len(self.correct), "correct": bits}

    @staticmethod
    def decoded(line: dict[str, Any]) -> Cell:
        bits = np.frombuffer(base64.b64decode(line["correct"]), dtype=np.uint8)
        correct = np.unpackbits(bits, count=line["items"]).astype(bool)
        return Cell(
            line["arm"], line["labels"], line["seed"], correct, line["macro_f1"], line["seconds"], line["chosen"]
        )


class CellFile:
    """`cells.jsonl`: a first line that says which study this is, then a line for each finished cell."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """Open, or begin, the file.

        Raises:
            UserError: it belongs to a study of something else.
        """
        self.path, self.cells = path, dict[tuple[str, int, int], Cell]()
        first = json.dumps({"format": FORMAT, "study": identity}, sort_keys=True)
        if not path.exists():
            write_atomically(path, first + "\n")
            return
        whole, _, rest = path.read_bytes().rpartition(b"\n")
        lines = whole.decode().split("\n")
        differing = _differing(lines[0], first)
        if differing:
            raise UserError(
                f"{path} holds a study with another {', '.join(differing)}; choose another --output, "
                "or start this one afresh with --overwrite"
            )
        if rest:  # a line that a kill cut off
            write_atomically(path, whole + b"\n")
        for line in lines[1:]:
            cell = Cell.decoded(json.loads(line))
            self.cells[cell.key] = cell

    def add(self, cell: Cell) -> None:
        """Keep a finished cell; it is on disk when this returns."""
        append(self.path, (json.dumps(cell.encoded()) + "\n").encode())
        sync(self.path)
        self.cells[cell.key] = cell


def _differing(found: str, wanted: str) -> list[str]:
    """Names of the facts in which two first lines differ."""
    try:
        old, new = json.loads(found)["study"], json.loads(wanted)["study"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return ["format"]
    return [name for name in new if old.get(name) != new[name]]


def write_table(path: Path, cells: Iterable[Cell]) -> None:
    """`cells.csv`: one line for each cell, for other programs."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["arm", "labels", "seed", "accuracy", "low", "high", "macro_f1", "seconds", "chosen"])
    for cell in cells:
        low, high = wilson(int(cell.correct.sum()), len(cell.correct))
        row = [cell.arm, cell.labels, cell.seed, *(f"{x:.6f}" for x in (cell.accuracy, low, high, cell.macro_f1))]
        writer.writerow([*row, f"{cell.seconds:.3f}", json.dumps(cell.chosen)])
    write_atomically(path, table.getvalue())
