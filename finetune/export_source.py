"""What is exported: an encoder, alone or with a head on its pooled features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from data.errors import UserError
from finetune.encoder import Encoder
from finetune.heads import LinearHead, NeighbourHead
from finetune.model import Head, TaskModel
from finetune.targets_vector import Regression

Format = Literal["timm", "transformers", "torchvision", "onnx", "torch"]
FORMATS: tuple[Format, ...] = ("timm", "transformers", "torchvision", "onnx", "torch")


@dataclass(frozen=True)
class Exported:
    """An encoder in `eval` on the CPU, and what stands on it."""

    encoder: Encoder
    head: Head | None = None
    """None: the pooled features themselves are exported."""
    classes: list[str] = field(default_factory=list)
    """Names of the outputs, in order."""
    task: str = "features"
    """The kind of task, as `Target.name`; `features` without a head."""
    temperature: float = 1.0
    """Logits are divided by it."""
    units: tuple[Tensor, Tensor] | None = None
    """Of a regression: the scale and mean that turn outputs into the targets' own units."""
    about: dict[str, Any] = field(default_factory=dict)
    """Facts for the card."""

    @classmethod
    def of_model(cls, model: TaskModel) -> Exported:
        """Raises `UserError` for a model that judges tokens or pixels, which no format here holds."""
        target = model.target
        if target.dense:
            raise UserError(f"a model for {target.name} judges every token or patch; only pooled tasks are exported")
        units = None
        if isinstance(target, Regression):
            units = torch.tensor(target.scale), torch.tensor(target.mean)
        encoder, head = model.encoder.cpu().eval(), model.head.cpu().eval()
        return cls(encoder, head, target.classes, target.name, model.temperature, units, model.about)

    @torch.no_grad()
    def outputs(self, *inputs: Tensor) -> Tensor:
        """What every export of this must give: logits, values, or features, float32 (b, outputs)."""
        return self.finish(self.encoder.pool(*inputs))

    def finish(self, features: Tensor) -> Tensor:
        """The same from pooled features (b, d)."""
        if self.head is None:
            return features.float()
        if isinstance(self.head, NeighbourHead):
            logits = neighbour_logits(self.head, features)
        else:
            logits = self.head(features.float())
        logits = logits / self.temperature
        return logits if self.units is None else logits * self.units[0] + self.units[1]

    def linear(self) -> tuple[Tensor, Tensor]:
        """Weight (outputs, d) and bias (outputs,) of the one linear layer that the head amounts to, float64.

        Standardisation, temperature and units are folded in. Raises `UserError` for a head that is none.
        """
        if not isinstance(self.head, LinearHead) or not isinstance(self.head.norm, torch.nn.Identity):
            kind = "a bank of neighbours" if isinstance(self.head, NeighbourHead) else "a layer norm"
            raise UserError(
                f"this model's head holds {kind}, and the format has one linear layer; "
                "export it as onnx or torch, or fine-tune with another strategy"
            )
        weight = self.head.linear.weight.detach().double() * self.head.scale.double()
        bias = self.head.linear.bias.detach().double() - weight @ self.head.mean.double()
        return self.fold(weight, bias)

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Temperature and units into a linear layer."""
        weight, bias = weight / self.temperature, bias / self.temperature
        if self.units is not None:
            scale, mean = (part.double() for part in self.units)
            weight, bias = weight * scale[:, None], bias * scale + mean
        return weight, bias


def neighbour_logits(head: NeighbourHead, features: Tensor) -> Tensor:
    """Log of the votes' shares (b, classes), those below 1e-12 counting as that, in operations that graphs hold."""
    similarity = torch.nn.functional.normalize(features.float(), dim=1) @ head.bank.T
    values, places = similarity.topk(head.k, dim=1)
    members = torch.nn.functional.one_hot(head.labels[places], head.classes).float()
    shares = ((values / head.temperature).softmax(dim=1)[:, :, None] * members).sum(dim=1)
    return shares.clamp(min=1e-12).log()
