"""Fine-tuning on tasks that are no classification of samples: every seed's model fitted and judged."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from data.errors import UserError
from finetune.encoder import Encoder
from finetune.features import accelerator_for
from finetune.judge import Judgement, flat_features, judge, score_intervals
from finetune.linear_targets import fit_linear_target
from finetune.model import TaskModel
from finetune.results import FORMAT, describe_encoder
from finetune.samples import Samples
from finetune.settings import STRATEGIES, Settings, Strategy
from finetune.splits import subset
from finetune.strategies import fit_trained
from finetune.targets import Target
from finetune.tasks import Report, Task, settle
from finetune.train import Trace
from finetune.trained_head import Rows, fit_head

SCORES = {"micro_f1": "micro-F1", "r2": "R²", "f1": "F1", "token_accuracy": "token accuracy", "miou": "mIoU"}
"""How the merits are called where people read them."""


def study_targets(
    encoder: Encoder,
    task: Task,
    strategy: Strategy,
    budget: int | None,
    seeds: list[int],
    settings: Settings,
    report: Report,
    trace: Trace | None = None,
) -> tuple[dict[str, Any], TaskModel]:
    """The results, and the first seed's model; `budget` is of samples (rows, for tokens).

    Raises:
        UserError: a strategy that makes no sense for the task.
    """
    target = task.target
    if strategy == "knn":
        others = ", ".join(name for name in STRATEGIES if name != "knn")
        raise UserError(f"knn votes for one class a sample, which {target.name} does not ask for; choose {others}")
    if task.held_out:
        report(f"no test set given: {len(task.test):,} of the labelled samples are held out as one")
    settle(task.train, report)
    settle(task.test, report)
    judged: list[Judgement] = []
    runs: list[dict[str, Any]] = []
    first: TaskModel | None = None
    for seed in seeds:
        samples = task.train.select(subset(task.train.labels, budget, seed))
        started = time.perf_counter()
        model = fit(strategy, encoder, samples, seed, settings, trace if first is None else None)
        seconds = time.perf_counter() - started
        judged.append(judge(model.encoder, model.head, task.test, settings, accelerator_for(settings)))
        entry = {"seed": seed, "labels": len(samples), **judged[-1].score(), "seconds": round(seconds, 3)}
        runs.append(entry | {"chosen": model.about["chosen"]})
        report(f"{strategy}, {len(samples):,} samples, seed {seed}: {told(target, entry)}, {seconds:.1f} s")
        if first is None:
            model.about |= {"strategy": strategy, "seed": seed, "labels": len(samples)}
            first = model
    assert first is not None
    results: dict[str, Any] = {
        "format": FORMAT,
        "strategy": strategy,
        "labels_per_class": budget,
        "seeds": seeds,
        "task": target.name,
    }
    results |= summarize(target, judged, runs) | {"baseline": baseline(task)}
    results |= describe_data(task) | {"encoder": describe_encoder(encoder), "runs": runs}
    results["settings"] = settings.model_dump(mode="json")
    first.about["encoder"] = results["encoder"]
    return results, first


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


def summarize(target: Target, judged: list[Judgement], scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores averaged over seeds, and 95 % intervals over seeds and test samples: of the merit, and of all scores
    that have one (see `score_intervals`)."""
    names = list(judged[0].score())
    means = {name: float(np.mean([score[name] for score in scores])) for name in names}
    found = {name: list(bounds) for name, bounds in score_intervals(judged).items()}
    return {"merit": target.merit, **means, "scores": means, "interval": found[target.merit], "intervals": found}


def baseline(task: Task) -> dict[str, float]:
    """What deciding the same for every test sample, the best for the training samples, would score."""
    train, truth = (_truth(samples) for samples in (task.train, task.test))
    constant = task.target.constant(train)
    same = [constant[: len(each)] if task.target.name == "tokens" else constant for each in truth]
    return task.target.score(same, truth)


def describe_data(task: Task) -> dict[str, Any]:
    """The data: names, sizes, fingerprints."""
    return {
        "classes": task.classes,
        "train": {"samples": len(task.train), "fingerprint": task.fingerprints["train"]},
        "test": {
            "samples": len(task.test),
            "fingerprint": task.fingerprints["test"],
            "held_out": task.held_out,
        },
    }


def told(target: Target, score: dict[str, Any]) -> str:
    """The merit in words."""
    return f"{SCORES[target.merit]} {score[target.merit]:.3f}"


def _truth(samples: Samples) -> list[Any]:
    return [samples.truth(np.array([i]))[0] for i in range(len(samples))]
