"""Every seed's model fitted and judged on the same test samples, whatever the kind of task."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from finetune.encoder import Encoder
from finetune.features import accelerator_for
from finetune.model import TaskModel
from finetune.results import FORMAT, describe_data, describe_encoder
from finetune.samples import Ints
from finetune.settings import Settings, Strategy
from finetune.splits import subset
from finetune.tasks import Report, Task
from finetune.train import Trace

Judged = TypeVar("Judged")


@dataclass(frozen=True)
class Study:
    """What all seeds have in common."""

    encoder: Encoder
    task: Task
    strategy: Strategy
    budget: int | None
    """Labels a class; without classes, samples (rows, for tokens)."""
    seeds: Sequence[int]
    settings: Settings


class Cases(ABC, Generic[Judged]):
    """The seeds of a study: how each is fitted, judged and told of.

    Made from the study, the positions of each seed's training samples, and a function that reports; raises
    `UserError` for a strategy that makes no sense for the task.
    """

    @abstractmethod
    def fit(self, seed: int, positions: Ints, trace: Trace | None) -> tuple[TaskModel, Judged]:
        """One seed's model, and what it says about the test samples; `about["chosen"]` is set."""

    @abstractmethod
    def scores(self, judged: Judged) -> dict[str, Any]:
        """What a seed's entry in the results says of it."""

    @abstractmethod
    def told(self, judged: Judged) -> str:
        """The same in a few words."""

    @abstractmethod
    def summary(self, judged: list[Judged]) -> dict[str, Any]:
        """Over all seeds, with intervals, beside what deciding without any input would score."""


def study(
    cases: Callable[[Study, list[Ints], Report], Cases[Judged]], plan: Study, report: Report, trace: Trace | None
) -> tuple[dict[str, Any], TaskModel]:
    """The results, and the first seed's model, whose training leaves its `trace`."""
    task, strategy = plan.task, plan.strategy
    if task.held_out:
        report(f"no test set given: {len(task.test):,} of the labelled samples are held out as one")
    subsets = [subset(task.train.labels, plan.budget, seed) for seed in plan.seeds]
    started = time.perf_counter()
    each = cases(plan, subsets, report)
    preparation = time.perf_counter() - started
    judged: list[Judged] = []
    entries: list[dict[str, Any]] = []
    first: TaskModel | None = None
    for seed, positions in zip(plan.seeds, subsets, strict=True):
        started = time.perf_counter()
        model, found = each.fit(seed, positions, trace if first is None else None)
        seconds = time.perf_counter() - started
        judged.append(found)
        entry: dict[str, Any] = {
            "seed": seed,
            "labels": len(positions),
            **each.scores(found),
            "seconds": round(seconds, 3),
        }
        entries.append(entry | {"chosen": model.about["chosen"]})
        report(f"{strategy}, {len(positions):,} labels, seed {seed}: {each.told(found)}, {seconds:.1f} s")
        if first is None:
            model.about |= {"strategy": strategy, "seed": seed, "labels": len(positions)}
            first = model
    assert first is not None
    results: dict[str, Any] = {"format": FORMAT, "task": task.target.name, "strategy": strategy}
    results |= {"labels_per_class": plan.budget, "seeds": list(plan.seeds), **each.summary(judged)}
    results |= {"seconds": round(sum(entry["seconds"] for entry in entries), 3), "runs": entries}
    results |= describe_data(task)
    results |= {"preparation_seconds": round(preparation, 3), "encoder": describe_encoder(plan.encoder)}
    precision = accelerator_for(plan.settings).mixed_precision
    results["settings"] = plan.settings.model_dump(mode="json") | {"precision": precision}
    first.about["encoder"] = results["encoder"]
    return results, first
