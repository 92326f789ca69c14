"""A study of a task that is no classification of samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from data.errors import UserError
from finetune.encoder import Encoder
from finetune.features import accelerator_for
from finetune.judge import Judgement, flat_features, judge, score_intervals
from finetune.linear_targets import fit_linear_target
from finetune.model import TaskModel
from finetune.samples import Ints, Samples
from finetune.settings import STRATEGIES, Settings, Strategy
from finetune.strategies import fit_trained
from finetune.study import Cases, Study
from finetune.targets import SCORES
from finetune.tasks import Report, Task, settle
from finetune.train import Trace
from finetune.trained_head import Rows, fit_head


class TargetCases(Cases[Judgement]):
    """Seeds of a task that is no classification."""

    def __init__(self, plan: Study, subsets: list[Ints], report: Report) -> None:
        self.plan, target = plan, plan.task.target
        if plan.strategy == "knn":
            others = ", ".join(name for name in STRATEGIES if name != "knn")
            raise UserError(f"knn votes for one class a sample, which {target.name} does not ask for; choose {others}")
        settle(plan.task.train, report)
        settle(plan.task.test, report)

    def fit(self, seed: int, positions: Ints, trace: Trace | None) -> tuple[TaskModel, Judgement]:
        plan, test = self.plan, self.plan.task.test
        model = fit(plan.strategy, plan.encoder, plan.task.train.select(positions), seed, plan.settings, trace)
        return model, judge(model.encoder, model.head, test, plan.settings, accelerator_for(plan.settings))

    def scores(self, judged: Judgement) -> dict[str, Any]:
        return judged.score()

    def told(self, judged: Judgement) -> str:
        return told(judged)

    def summary(self, judged: list[Judgement]) -> dict[str, Any]:
        return summarize(judged) | {"baseline": baseline(self.plan.task)}


def fit(
    strategy: Strategy, encoder: Encoder, samples: Samples, seed: int, settings: Settings, trace: Trace | None = None
) -> TaskModel:
    """One model of the samples' own target; `about["chosen"]` says what was chosen."""
    accelerator = accelerator_for(settings)
    target = samples.target
    if strategy == "linear":
        features, truth, owners = flat_features(encoder, samples, settings, accelerator)
        head, chosen = fit_linear_target(target, features, truth, owners, seed, settings.strength, settings.standardize)
        return TaskModel(encoder, head, target.classes, {"chosen": chosen}, target=target)
    if strategy == "frozen":
        features, truth, owners = flat_features(encoder, samples, settings, accelerator)
        trained, chosen = fit_head(Rows(features, truth, owners.numpy(), samples.labels), target, seed, settings)
        return TaskModel(encoder, trained, target.classes, {"chosen": chosen}, target=target)
    model = fit_trained(strategy, encoder, samples, target.classes, seed, settings, accelerator, trace)
    model.target = target
    return model


def summarize(judged: list[Judgement]) -> dict[str, Any]:
    """Scores averaged over seeds, and 95 % intervals over seeds and test samples: of the merit, and of all scores
    that have one (see `score_intervals`)."""
    scores = [each.score() for each in judged]
    means = {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}
    found = {name: list(bounds) for name, bounds in score_intervals(judged).items()}
    merit = judged[0].target.merit
    return {"merit": merit, **means, "scores": means, "interval": found[merit], "intervals": found}


def baseline(task: Task) -> dict[str, float]:
    """What deciding the same for every test sample, the best for the training samples, would score."""
    train, truth = (_truth(samples) for samples in (task.train, task.test))
    constant = task.target.constant(train)
    same = [constant[: len(each)] if task.target.name == "tokens" else constant for each in truth]
    return task.target.score(same, truth)


def told(judged: Judgement) -> str:
    """The merit, for people."""
    return f"{SCORES[judged.target.merit]} {judged.merit:.3f}"


def _truth(samples: Samples) -> list[Any]:
    return [samples.truth(np.array([i]))[0] for i in range(len(samples))]
