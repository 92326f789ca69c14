"""Models beside each other on the same items: their merit, and differences with paired intervals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from finetune.calibration import expected_calibration_error, log_losses
from finetune.evidence import Score, interval, score
from finetune.features import accelerator_for
from finetune.judge import Judgement, judge, sums_intervals
from finetune.leads import Correct, lead, merit_lead
from finetune.model import TaskModel
from finetune.samples import Ints, Samples
from finetune.settings import Settings
from finetune.targets import Floats, Target
from finetune.targets_class import Classification


class Judged(ABC):
    """What a model said about labelled items, as far as comparing needs it."""

    name: str
    """Of the model."""

    @property
    @abstractmethod
    def merit(self) -> float:
        """The target's score that models are compared by; higher is better."""

    @property
    @abstractmethod
    def loss(self) -> float:
        """Mean of `Target.mismatch` over what is judged."""

    @abstractmethod
    def __len__(self) -> int:
        """Items."""

    @abstractmethod
    def entry(self) -> dict[str, Any]:
        """A line of the results: `name`, the merit by its name, its 95 % `interval`, other scores."""

    @classmethod
    @abstractmethod
    def summary(cls, seeds: Sequence[Self]) -> dict[str, Any]:
        """Merit and 95 % interval of several seeds' models on the same items."""

    @classmethod
    @abstractmethod
    def lead(cls, ours: Sequence[Self], theirs: Sequence[Self]) -> dict[str, Any]:
        """How much better several seeds' models are than as many others: the difference and its paired interval."""


@dataclass(frozen=True)
class JudgedClasses(Judged):
    """Of a classification."""

    name: str
    probabilities: NDArray[np.float32]
    """(n, classes), rows sum to 1."""
    labels: Ints
    """(n,) true classes."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def score(self) -> Score:
        """Accuracy with its interval, and macro-F1."""
        return score(self.probabilities, self.labels)

    @property
    def merit(self) -> float:
        """The accuracy."""
        return self.score.accuracy

    @property
    def loss(self) -> float:
        """Mean negative log probability of the true class, in nats."""
        return float(log_losses(self.probabilities, self.labels).mean())

    @property
    def calibration_error(self) -> float:
        """Expected calibration error (Guo et al. 2017)."""
        confidence = self.probabilities.max(axis=1).astype(np.float64)
        return expected_calibration_error(confidence, self.score.correct)

    def entry(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "accuracy": self.score.accuracy,
            "interval": list(self.score.interval),
            "macro_f1": self.score.macro_f1,
            "log_loss": self.loss,
            "calibration_error": self.calibration_error,
        }

    @classmethod
    def summary(cls, seeds: Sequence[Self]) -> dict[str, Any]:
        correct = _correct(seeds)
        return {"accuracy": float(correct.mean()), "interval": list(interval(correct))}

    @classmethod
    def lead(cls, ours: Sequence[Self], theirs: Sequence[Self]) -> dict[str, Any]:
        return lead(_correct(ours), _correct(theirs))


@dataclass(frozen=True)
class JudgedTarget(Judged):
    """Of any other kind of task."""

    name: str
    target: Target
    sums: Floats
    """(n, k): `Target.sums` of each item."""
    scores: dict[str, float]
    """By name, the merit among them."""
    mismatch: float
    """Its mean over what is judged."""

    @classmethod
    def of(cls, name: str, judgement: Judgement) -> Self:
        """From everything that was decided."""
        sums = judgement.target.sums(judgement.decided, judgement.truth)
        return cls(name, judgement.target, sums, judgement.score(), judgement.loss)

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def merit(self) -> float:
        return self.scores[self.target.merit]

    @property
    def loss(self) -> float:
        return self.mismatch

    def entry(self) -> dict[str, Any]:
        return {"name": self.name, **self.summary([self]), self.target.misfit: self.loss}

    @classmethod
    def summary(cls, seeds: Sequence[Self]) -> dict[str, Any]:
        """The merit with its interval, then the other scores; each a mean over seeds."""
        target = seeds[0].target
        means = {name: float(np.mean([each.scores[name] for each in seeds])) for name in seeds[0].scores}
        bounds = sums_intervals(target, np.stack([each.sums for each in seeds]))[target.merit]
        return {target.merit: means.pop(target.merit), "interval": list(bounds), **means}

    @classmethod
    def lead(cls, ours: Sequence[Self], theirs: Sequence[Self]) -> dict[str, Any]:
        sums = [np.stack([each.sums for each in seeds]) for seeds in (ours, theirs)]
        return merit_lead(ours[0].target, sums[0], sums[1])


def judged(name: str, judgement: Judgement) -> Judged:
    """What was decided, to be compared."""
    if isinstance(judgement.target, Classification):
        probabilities, labels = (torch.stack(each).numpy() for each in (judgement.decided, judgement.truth))
        return JudgedClasses(name, probabilities, labels)
    return JudgedTarget.of(name, judgement)


def judge_model(name: str, model: TaskModel, test: Samples, settings: Settings) -> Judged:
    """What a model says about labelled samples of its own target."""
    if isinstance(model.target, Classification):
        return JudgedClasses(name, model.probabilities(test, settings).numpy(), test.labels)
    return judged(name, judge(model.encoder, model.head, test, settings, accelerator_for(settings)))


def beside(ours: Judged, references: Sequence[Judged]) -> dict[str, Any]:
    """The entry of `ours`, with its lead over each of `references` on the same items."""
    leads = [{"over": other.name} | type(ours).lead([ours], [other]) for other in references]
    return ours.entry() | {"leads": leads}


def _correct(seeds: Sequence[JudgedClasses]) -> Correct:
    return np.stack([each.score.correct for each in seeds])
