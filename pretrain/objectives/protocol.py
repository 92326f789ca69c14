"""The one contract between the loop and an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from data.batch import ImageBatch, TextBatch


@dataclass
class Output:
    """What one forward pass over one microbatch yields."""

    loss_sum: Tensor
    """float32 scalar: the loss summed (not averaged) over this microbatch's targets."""
    target_count: Tensor
    """float32 scalar: how many targets were summed (patches, tokens, samples)."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """Detached sums over the same targets; the loop divides them by the global count of targets."""


class Objective(nn.Module, ABC):
    """A pre-training task around an encoder.

    All state lives in parameters or *persistent* buffers, so that `state_dict()` is the checkpoint.
    Randomness comes from `batch.keys` through `data.keyed` alone. The loop sums `loss_sum` and
    `target_count` over microbatches and processes and divides once, so no objective averages.
    """

    encoder: nn.Module

    @abstractmethod
    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """The loss of one microbatch; `progress` in [0, 1] is the share of training done."""

    def after_step(self, progress: float) -> None:
        """Called once after each optimiser step: teachers, centres, queues."""

    def exported(self) -> nn.Module:
        """The encoder that downstream work gets."""
        return self.encoder

    def sights(self, batch: ImageBatch) -> dict[str, Tensor]:
        """For looking at: rows of pictures by name, each float32 (b, 3, h, w) in [0, 1]; none by default."""
        return {}
