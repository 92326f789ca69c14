"""The study's means, intervals and costs by arm and budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finetune.advise.cells import Arm, Cell
from finetune.advise.intervals import Estimate, Evidence


class Table:
    """The study's means and their draws by arm and budget."""

    def __init__(self, cells: Sequence[Cell], arms: Sequence[Arm]) -> None:
        self.evidence = Evidence(cells)
        self.arms = [arm for arm in arms if any(cell.arm == arm.name for cell in cells)]
        self.budgets = sorted({cell.labels for cell in cells})
        self.cells = list(cells)
        found = ((arm, n, self.evidence.accuracy(arm.name, n)) for arm in self.arms for n in self.budgets)
        self.accuracy: dict[tuple[str, int], Estimate] = {(arm.name, n): e for arm, n, e in found if e is not None}

    def measured(self, arm: str) -> list[int]:
        """The budgets with which an arm was run."""
        return [n for n in self.budgets if (arm, n) in self.accuracy]

    def seconds(self, arm: str, labels: int) -> float:
        """Median seconds of a cell."""
        return float(np.median([c.seconds for c in self.cells if c.arm == arm and c.labels == labels]))

    def difference(self, arm: Arm, other: Arm, labels: int) -> Estimate | None:
        """Paired; untrained weights are one draw of many."""
        another = (arm.weights == "untrained") != (other.weights == "untrained")
        return self.evidence.difference(arm.name, other.name, labels, another_draw=another)
