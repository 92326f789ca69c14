"""Runs the cells of a study cheap first, keeps each, and stops at the cap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from data.errors import UserError
from finetune.advise.cells import Arm, Cell, CellFile
from finetune.advise.clock import SAFETY, Costs, OutOfTime, work
from finetune.advise.runner import Runner
from finetune.rates import UNTRAINED
from finetune.settings import Settings
from finetune.strategies import FROZEN
from finetune.tasks import Report

CANDIDATES = len(UNTRAINED)
"""Learning rates that a trained strategy tries, as far as the cost of a cell goes."""
UP = "the time was up"
Key = tuple[Arm, int, int]


@dataclass(frozen=True)
class Plan:
    """Every cell of a study."""

    arms: list[Arm]
    budgets: list[int]
    seeds: list[int]
    subsets: dict[tuple[int, int], np.ndarray]
    """Positions of the training samples of (budget, seed)."""
    settings: Settings
    test_items: int

    def cells(self) -> list[tuple[str, int, int]]:
        """(arm, labels, seed) of all cells."""
        return [(arm.name, labels, seed) for arm, labels, seed in self.order()]

    def order(self) -> list[Key]:
        """Cheap first: frozen strategies, then trained ones by the cost of a budget times the seed's number.

        So a third seed of a budget comes when the first seed of one three times as dear would, and all strategies
        of a budget and seed come together, so that they can be compared.
        """
        every = [(arm, labels, seed) for labels in self.budgets for seed in self.seeds for arm in self.arms]
        return sorted(every, key=self._rank)

    def size(self, arm: Arm, labels: int) -> float:
        """Work of a cell, see `finetune.advise.clock.work`; for frozen strategies the number of labels."""
        if cheap(arm):
            return float(labels)
        return work(labels, self.test_items, self.settings, CANDIDATES)

    def _rank(self, key: Key) -> tuple[bool, float, int, int]:
        arm, labels, seed = key
        if cheap(arm):
            return (False, labels, seed, self.arms.index(arm))
        return (True, self.size(arm, labels) * (1 + self.seeds.index(seed)), labels, self.arms.index(arm))


def cheap(arm: Arm) -> bool:
    """Whether an arm trains no encoder."""
    return arm.strategy == "majority" or arm.strategy in FROZEN


def run_cells(plan: Plan, runner: Runner, file: CellFile, report: Report) -> list[dict[str, Any]]:
    """Run what is missing; returns the cells that were not run, with the reason."""
    pending = [key for key in plan.order() if (key[0].name, *key[1:]) not in file.cells]
    arms = {arm.name: arm for arm in plan.arms}
    costs = Costs(lambda name, labels: plan.size(arms[name], labels))
    for kept in file.cells.values():
        if kept.arm in arms and not cheap(arms[kept.arm]):
            costs.note(kept.arm, kept.labels, kept.seconds)
    missing: list[dict[str, Any]] = []
    done = len(plan.order()) - len(pending)
    report(f"{done + len(pending)} cells, {done} of them done; {_time(runner.clock.left())} left for the others")
    for number, (arm, labels, seed) in enumerate(pending, start=done + 1):
        reason, cell = _attempt(arm, labels, seed, plan, runner, costs)
        if cell is None:
            missing.append({"arm": arm.name, "labels": labels, "seed": seed, "reason": reason})
            if len(missing) > 1:
                continue
            report(f"[{number}/{done + len(pending)}] {arm.name}, {labels:,} labels, seed {seed}: not run, {reason}")
            continue
        file.add(cell)
        costs.note(arm.name, labels, runner.fitting)
        report(
            f"[{number}/{done + len(pending)}] {arm.name}, {labels:,} labels, seed {seed}: "
            f"{100 * cell.accuracy:.1f} % in {_time(cell.seconds)}; {_time(runner.clock.left())} left"
        )
    if len(missing) > 1:
        report(f"{len(missing) - 1} more cells were not run; advise.json names them")
    return missing


def _attempt(arm: Arm, labels: int, seed: int, plan: Plan, runner: Runner, costs: Costs) -> tuple[str, Cell | None]:
    """The cell, or why there is none."""
    positions = plan.subsets[labels, seed]
    try:
        runner.clock.check()
        needed = _estimate(arm, labels, seed, plan, runner, costs)
        if needed > runner.clock.left():
            return f"it would take about {_time(needed)}, {_time(runner.clock.left())} were left", None
        return "", runner.run(arm, positions, seed)
    except OutOfTime:
        return UP, None
    except UserError as error:
        if "diverged" not in str(error):
            raise
        return str(error), None


def _estimate(arm: Arm, labels: int, seed: int, plan: Plan, runner: Runner, costs: Costs) -> float:
    """Seconds the cell will take, as far as can be known."""
    if arm.strategy == "majority":
        return 0.0
    if cheap(arm):
        features = runner.to_extract(arm, plan.subsets[labels, seed], seed)
        return features + (costs.predict(arm.name, labels) or 0.0)
    others = [other.name for other in plan.arms if not cheap(other) and other != arm]
    own = costs.predict(arm.name, labels)
    known = [own] if own is not None else [costs.predict(other, labels) for other in others]
    found = [seconds for seconds in known if seconds is not None]
    if found:
        return max(found)
    smallest = plan.subsets[min(plan.budgets), plan.seeds[0]]
    return SAFETY * runner.probe(arm, smallest) * plan.size(arm, labels)


def _time(seconds: float) -> str:
    seconds = max(0.0, seconds)
    return f"{seconds / 60:.1f} min" if seconds >= 100 else f"{seconds:.1f} s"
