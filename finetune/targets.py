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
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from data.errors import UserError

TaskName = Literal["classification", "multi-label", "regression", "tokens", "segmentation"]
TASKS: tuple[TaskName, ...] = ("classification", "multi-label", "regression", "tokens", "segmentation")
IGNORED = -100
"""Truth that neither loss nor score counts."""
TINY = 1e-12
"""Probabilities count as this at least where their logarithm is taken."""
SCORES = {
    "accuracy": "accuracy",
    "micro_f1": "micro-F1",
    "r2": "R²",
    "f1": "F1",
    "token_accuracy": "token accuracy",
    "miou": "mIoU",
}
"""How the merits are called where people read them."""
Floats = NDArray[np.float64]


class Target(ABC):
    """One kind of task over given names: how outputs become a loss, a score and predictions.

    Per-sample rows: where a list is asked for, it has one tensor a sample.
    """

    name: ClassVar[TaskName]
    merit: str
    """The score that models are compared by; higher is better."""
    misfit: ClassVar[str] = "log_loss"
    """What the mean of `mismatch` is called."""
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
    def distribution(self, outputs: Tensor) -> Tensor:
        """What outputs say, float32 (…, outputs) on their device: probabilities, or values in their own units.

        The weighted mean of several models' is again one: what their ensemble says.
        """

    @abstractmethod
    def decision(self, said: Tensor) -> Tensor:
        """What is judged and told of a `distribution`: probabilities, values, tags or classes of pixels."""

    def decide(self, outputs: Tensor) -> Tensor:
        """The same of outputs, on their device."""
        return self.decision(self.distribution(outputs))

    @abstractmethod
    def likelihoods(self, said: Tensor, truth: Tensor) -> Tensor:
        """The probability that a `distribution` gives to what is true, float32 (m,), at each place that is judged.

        Raises:
            NotImplementedError: quantities have none.
        """

    def mismatch(self, said: Tensor, truth: Tensor) -> Tensor:
        """How far a `distribution` is from the truth at each judged place, float64 (m,); its mean is the loss.

        In nats, of probabilities of 1e-12 at least; of quantities, squared errors in standard deviations.
        """
        return -self.likelihoods(said, truth).double().clamp_min(TINY).log()

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


def target_from(described: dict[str, Any]) -> Target:
    """The target that `describe` described; a classification where no task is named.

    Raises:
        UserError: a kind of task that is not known here.
        KeyError, TypeError: something is missing or of another type.
    """
    from finetune.targets_class import Classification
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
