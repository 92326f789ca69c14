"""The one contract between the loop and an objective."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from data.batch import ImageBatch, TextBatch
from data.mixture import Samples
from pretrain.gather import all_sum, gather, rank

Tensors = dict[str, Tensor]


@dataclass
class Output:
    """What one forward pass over one microbatch yields."""

    loss_sum: Tensor
    """float32 scalar: the loss summed (not averaged) over this microbatch's targets."""
    target_count: Tensor
    """float32 scalar: how many targets were summed (patches, tokens, samples)."""
    metrics: Tensors = field(default_factory=dict)
    """Detached sums over the same targets; the loop divides them by the global count of targets.

    `agreement`, how far student and teacher agree (at most 1), becomes part of the alarm when features collapse.
    """
    statistics: Tensors = field(default_factory=dict)
    """Detached sums that `after_step` gets, added up over microbatches and processes."""


class Objective(nn.Module, ABC):
    """A pre-training task around an encoder.

    All state lives in parameters or *persistent* buffers, so that `state_dict()` is the checkpoint, and a forward
    pass changes none of it but BatchNorm's running statistics (which the loop restores if the step does not count).
    Randomness comes from `batch.keys` through `data.keyed` alone. The loop sums `loss_sum` and
    `target_count` over microbatches and processes and divides once, so no objective averages.
    """

    encoder: nn.Module
    joint: bool = False
    """Whether the loss of a sample depends on the other samples of the global batch: see `JointObjective`."""

    @abstractmethod
    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """The loss of one microbatch; `progress` in [0, 1] is the share of training done."""

    def read(self, data: Samples) -> None:
        """Called once before training, and before a checkpoint is restored: what only the training data can tell."""

    def before_step(self, progress: float) -> None:
        """Called before each optimiser step, which may turn out not to count: what is frozen until when."""

    def after_step(self, progress: float, statistics: Tensors) -> None:
        """Called once after each optimiser step that counts: teachers, centres, queues.

        `statistics` are the sums of `Output.statistics` over the global batch.
        """

    def exported(self) -> nn.Module:
        """The encoder that downstream work gets."""
        return self.encoder

    def sights(self, batch: ImageBatch) -> dict[str, Tensor]:
        """For looking at: rows of pictures by name, each float32 (b, 3, h, w) in [0, 1]; none by default."""
        return {}


class JointObjective(Objective):
    """An objective that compares samples, cut where the comparison begins.

    `view` and `embed` work sample by sample (but for BatchNorm in the encoder, see `pretrain.norm`); `compare` gets
    the embeddings of this process's whole share of the global batch, however many microbatches they came in, and
    reaches other processes' by `everyone` and `total`. So the loss is that of the global batch whatever its split.
    With several microbatches the loop embeds twice: without a gradient, and, once `compare` has told the gradient
    of the embeddings, with one (GradCache: Gao et al. 2021, section 3).
    """

    joint = True

    @abstractmethod
    def view(self, batch: ImageBatch) -> Tensors:
        """What is drawn from the samples' keys: views (views, b, 3, s, s), masks (b, …) and the like."""

    @abstractmethod
    def embed(self, views: Tensors, progress: float) -> Tensors:
        """Embeddings (b, …) that a gradient flows through."""

    def observe(self, views: Tensors, progress: float) -> Tensors:
        """What `compare` needs besides, without a gradient: a teacher's embeddings, labels; each (b, …)."""
        return {}

    @abstractmethod
    def compare(self, embeddings: Tensors, progress: float) -> Output:
        """The loss of this process's samples, from what `embed` and `observe` gave."""

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """The loss of a process's whole share of a global batch."""
        assert isinstance(batch, ImageBatch)
        views = self.view(batch)
        return self.compare(self.embed(views, progress) | self.observe(views, progress), progress)

    def everyone(self, x: Tensor) -> Tensor:
        """All processes' `x` (b, …) in their order; in evaluation, where shares may differ, one's own."""
        return gather(x) if self.training else x

    def total(self, x: Tensor) -> Tensor:
        """The sum of all processes' `x`; in evaluation one's own."""
        return all_sum(x) if self.training else x

    def place(self, x: Tensor) -> int:
        """Where this process's rows begin in `everyone(x)`."""
        return rank() * len(x) if self.training else 0
