"""The task that asks for one class a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.evidence import macro_f1
from finetune.targets import Floats, Target, cross_entropy, ratio


class Classification(Target):
    """One class a sample. Truth int64 (b,); decisions are probabilities float32 (b, classes)."""

    name = "classification"
    merit = "accuracy"

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes

    def loss(self, outputs: Tensor, truth: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy."""
        return cross_entropy(outputs, truth, label_smoothing)

    def distribution(self, outputs: Tensor) -> Tensor:
        return outputs.float().softmax(dim=-1)

    def decision(self, said: Tensor) -> Tensor:
        return said

    def likelihoods(self, said: Tensor, truth: Tensor) -> Tensor:
        return said.gather(1, truth[:, None])[:, 0]

    def sums(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> Floats:
        """Whether each is right, and one."""
        hits = (torch.stack(list(decided)).argmax(dim=1) == torch.stack(list(truth))).double().numpy()
        return np.stack([hits, np.ones(len(hits))], axis=1)

    def summed(self, sums: Floats) -> dict[str, Floats]:
        return {"accuracy": ratio(sums[..., 0], sums[..., 1])}

    def score(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
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
