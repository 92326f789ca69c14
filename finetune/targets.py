"""What a model is to say about a sample: one small class for each kind of task.

A `Target` belongs to the samples (`samples.target`), so training needs no other argument:

    batch, truth = samples.batch(positions, keys), samples.truth(positions, keys, augment)
    outputs = head(encoder(batch, augment, dense=target.dense).float())
    loss_sum, count = target.loss(outputs, truth.to(outputs.device))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.errors import UserError

TaskName = Literal["classification", "multi-label", "regression", "tokens", "segmentation"]
TASKS: tuple[TaskName, ...] = ("classification", "multi-label", "regression", "tokens", "segmentation")
IGNORED = -100
"""Truth that neither loss nor score counts."""
Floats = NDArray[np.float64]


class Target(ABC):
    """One kind of task over given names: how outputs become a loss, a score and predictions.

    Per-sample rows: where a list is asked for, it has one tensor a sample.
    """

    name: ClassVar[TaskName]
    merit: str
    """The score that models are compared by; higher is better."""
    dense: ClassVar[bool] = False
    """Whether every token or patch is judged, from `encoder(batch, augment, dense=True)`."""
    classes: list[str]
    """Names of the classes, labels, tags or measured quantities."""

    @property
    def outputs(self) -> int:
        """Width of the head."""
        return len(self.classes)

    @abstractmethod
    def loss(self, outputs: Tensor, truth: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The sum of the losses and the count of targets, both float32 scalars.

        Args:
            outputs: of the head, float32 (b, outputs); dense: (b, n, outputs) or (b, h, w, outputs).
            truth: what `Samples.truth` gave for the same samples, on the same device.
        """

    def row_loss(self, outputs: Tensor, truth: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """The same of outputs (m, outputs) and truth (m, …) as `finetune.judge.flat_features` gives it."""
        return self.loss(outputs, truth, label_smoothing)

    @abstractmethod
    def decide(self, outputs: Tensor) -> Tensor:
        """What is judged and told of outputs, on their device: probabilities, values, tags or classes of pixels."""

    @abstractmethod
    def sums(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> Floats:
        """Float64 (n, k): each sample's counts, whose sum over samples determines the scores that sums can tell."""

    @abstractmethod
    def summed(self, sums: Floats) -> dict[str, Floats]:
        """Those scores (...) by name, the merit among them, that summed counts (..., k) tell."""

    def from_sums(self, sums: Floats) -> Floats:
        """The merit (...) of summed counts (..., k)."""
        return self.summed(sums)[self.merit]

    @abstractmethod
    def score(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
        """Every score of this kind by its name, the merit among them."""

    @abstractmethod
    def constant(self, truth: Sequence[Tensor]) -> Tensor:
        """What a model that sees no input would best decide: the commonest class, the mean; one sample's `decide`."""

    @abstractmethod
    def predictions(self, decided: Tensor) -> list[dict[str, Any]]:
        """One JSON-able object a sample."""

    def describe(self) -> dict[str, Any]:
        """What `task.json` keeps; the inverse of `target_from`."""
        return {"task": self.name, "classes": self.classes}


class Classification(Target):
    """One class a sample. Truth int64 (b,); decisions are probabilities float32 (b, classes)."""

    name = "classification"
    merit = "accuracy"

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def loss(self, outputs: Tensor, truth: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy."""
        return cross_entropy(outputs, truth, label_smoothing)

    def decide(self, outputs: Tensor) -> Tensor:
        return outputs.float().softmax(dim=-1)

    def sums(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> Floats:
        """Whether each is right, and one."""
        hits = [float(int(each.argmax()) == int(label)) for each, label in zip(decided, truth, strict=True)]
        return np.stack([np.array(hits), np.ones(len(hits))], axis=1)

    def summed(self, sums: Floats) -> dict[str, Floats]:
        return {"accuracy": ratio(sums[..., 0], sums[..., 1])}

    def score(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
        from finetune.evidence import macro_f1

        named = np.array([int(each.argmax()) for each in decided], dtype=np.int64)
        labels = np.array([int(label) for label in truth], dtype=np.int64)
        return {"accuracy": float((named == labels).mean()), "macro_f1": macro_f1(named, labels)}

    def constant(self, truth: Sequence[Tensor]) -> Tensor:
        common = torch.stack(list(truth)).bincount(minlength=self.outputs).argmax()
        return F.one_hot(common, self.outputs).float()

    def predictions(self, decided: Tensor) -> list[dict[str, Any]]:
        best = decided.max(dim=1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [{"label": self.classes[place], "probability": value} for place, value in pairs]


def target_from(described: dict[str, Any]) -> Target:
    """The target that `describe` described; a classification where no task is named.

    Raises:
        UserError: a kind of task that is not known here.
        KeyError, TypeError: something is missing or of another type.
    """
    from finetune.targets_dense import Segmentation, Tags
    from finetune.targets_vector import MultiLabel, Regression

    name, classes = described.get("task", "classification"), list(described["classes"])
    match name:
        case "classification":
            return Classification(classes)
        case "multi-label":
            return MultiLabel(classes)
        case "regression":
            return Regression(classes, described["mean"], described["scale"])
        case "tokens":
            return Tags(classes)
        case "segmentation":
            return Segmentation(classes, described["size"])
    raise UserError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")


def task_from(name: str) -> TaskName:
    """A known kind of task; raises `UserError` for any other name."""
    for task in TASKS:
        if name == task:
            return task
    raise UserError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")


def cross_entropy(logits: Tensor, truth: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Sum over, and count of, the places (...) of logits (..., classes) whose truth is not `IGNORED`."""
    flat = logits.reshape(-1, logits.shape[-1])
    total = F.cross_entropy(
        flat, truth.reshape(-1), ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing
    )
    return total, (truth != IGNORED).sum().float()


def ratio(part: Floats, whole: Floats) -> Floats:
    """part / whole, 0 where there is nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)
