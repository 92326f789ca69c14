"""A study of classifications: seeds share the features of a frozen encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from finetune.evidence import Score, interval, score
from finetune.features import accelerator_for, extract
from finetune.model import TaskModel
from finetune.results import majority_accuracy
from finetune.samples import Ints
from finetune.strategies import FROZEN, fit_frozen, fit_trained
from finetune.study import Cases, Study
from finetune.tasks import Report, settle
from finetune.train import Trace


class ClassCases(Cases[Score]):
    """Seeds of a classification."""

    def __init__(self, plan: Study, subsets: list[Ints], report: Report) -> None:
        self.plan, task = plan, plan.task
        self.accelerator = accelerator_for(plan.settings)
        self.needed = np.unique(np.concatenate(subsets))
        self.pool = task.train.select(self.needed)
        settle(self.pool, report)
        settle(task.test, report)
        self.labels = torch.from_numpy(self.pool.labels)
        if plan.strategy in FROZEN:
            self.features = extract(plan.encoder, self.pool, plan.settings, self.accelerator)
            self.judged = extract(plan.encoder, task.test, plan.settings, self.accelerator)

    def fit(self, seed: int, positions: Ints, trace: Trace | None) -> tuple[TaskModel, Score]:
        plan, task = self.plan, self.plan.task
        rows = np.searchsorted(self.needed, positions)
        how = (task.classes, seed, plan.settings)
        if plan.strategy in FROZEN:
            known = torch.from_numpy(rows)
            model = fit_frozen(plan.strategy, plan.encoder, self.features[known], self.labels[known], *how)
            said = model.from_features(self.judged)
        else:
            model = fit_trained(plan.strategy, plan.encoder, self.pool.select(rows), *how, self.accelerator, trace)
            said = model.probabilities(task.test, plan.settings)
        return model, score(said.numpy(), task.test.labels)

    def scores(self, judged: Score) -> dict[str, Any]:
        return {"accuracy": judged.accuracy, "interval": list(judged.interval), "macro_f1": judged.macro_f1}

    def told(self, judged: Score) -> str:
        low, high = (100 * bound for bound in judged.interval)
        return f"accuracy {100 * judged.accuracy:.1f} % ({low:.1f} to {high:.1f})"

    def summary(self, judged: list[Score]) -> dict[str, Any]:
        """Means over seeds, the interval over seeds and test samples, and what the commonest class would score."""
        return {
            "accuracy": float(np.mean([each.accuracy for each in judged])),
            "interval": list(interval(np.stack([each.correct for each in judged]))),
            "macro_f1": float(np.mean([each.macro_f1 for each in judged])),
            "majority_accuracy": majority_accuracy(self.plan.task),
        }
