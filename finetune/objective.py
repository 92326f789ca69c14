"""Fine-tuning as an objective of the training loop: encoder, head, and the loss of labelled samples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import UserError
from finetune.encoder import Augmentation, Encoder
from finetune.heads import LinearHead
from finetune.loader import Labelled
from finetune.samples import Samples
from finetune.settings import Settings
from finetune.stochastic_depth import StochasticDepth
from finetune.targets import Target
from finetune.targets_class import Classification
from pretrain.norm import batch_norms
from pretrain.objectives.protocol import Objective, Output, Tensors
from pretrain.views.mixing import MixConfig, mix, mixed_targets


class Learner(nn.Module):
    """What is trained, and what is kept of it."""

    def __init__(self, encoder: Encoder, head: LinearHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head


@dataclass(frozen=True)
class Views:
    """How training differs from judging."""

    augment: Augmentation | None = None
    mix: MixConfig | None = None
    """Mixup and CutMix of pictures; single-label classification alone."""
    label_smoothing: float = 0.0
    drop_path: float | None = None
    """See `finetune.stochastic_depth`; what the encoder itself does without."""

    @classmethod
    def of(cls, settings: Settings) -> Views:
        """As the settings say."""
        on = settings.mixup or settings.cutmix
        config = MixConfig(mixup=settings.mixup, cutmix=settings.cutmix) if on else None
        return cls(settings.augmentation, config, settings.label_smoothing, settings.drop_path)


class FineTuning(Objective):
    """Encoder and head on labelled samples: the loss that `target` defines, summed over its targets."""

    weights: Tensor | None

    def __init__(
        self,
        learner: Learner,
        target: Target,
        views: Views,
        weights: Tensor | None = None,
        before: Callable[[Encoder, float], None] | None = None,
        keeps_best: bool = False,
    ) -> None:
        """Around `learner`, whose `requires_grad` flags say what is trained.

        Args:
            weights: of the classes in the loss, float32 (classes,); all one without.
            before: called with the encoder and the progress before each step; may change `requires_grad`.
            keeps_best: leave room for the best state so far (see `keep`), as part of what is saved.

        Raises:
            UserError: class weights or mixing for a task that is no classification of pictures.
        """
        super().__init__()
        if not isinstance(target, Classification) and (weights is not None or views.mix is not None):
            raise UserError(f"balance, mixup and cutmix are for classification, not for {target.name}; leave them out")
        if views.mix is not None and learner.encoder.kind != "images":
            raise UserError("mixup and cutmix are for pictures; leave them out for text")
        self.learner, self.target, self.views, self.before = learner, target, views, before
        self.best = copy.deepcopy(learner).requires_grad_(False) if keeps_best else None
        self.register_buffer("weights", weights)
        # After the copy, which drops nothing.
        self.depth = None if views.drop_path is None else StochasticDepth(learner.encoder, views.drop_path)
        self._checked = before is not None or target.dense

    def forward(self, batch: Labelled, progress: float) -> Output:  # type: ignore[override]
        """The loss of one microbatch of labelled samples."""
        encoder, views = self.learner.encoder, self.views if self.training else Views()
        inputs, shares = encoder.inputs(batch.batch, views.augment), None
        if views.mix is not None:
            mixed, *shares = mix(inputs[0], batch.keys, views.mix)
            inputs = (mixed, *inputs[1:])
        if self.depth is not None and self.training:
            self.depth.draw(batch.keys)
        features = encoder.tokens(*inputs) if self.target.dense else encoder.pool(*inputs)
        with torch.autocast(features.device.type, enabled=False):
            outputs = self.learner.head(features.float())
            return Output(*self._loss(outputs, batch.truth, shares))

    def before_step(self, progress: float) -> None:
        """Let `before` freeze and unfreeze; what is frozen keeps its BatchNorm statistics."""
        if self.before is not None:
            self.before(self.learner.encoder, progress)
            self.train()

    def after_step(self, progress: float, statistics: Tensors) -> None:
        """At the first step: every parameter that is to be trained must have got a gradient.

        Raises `UserError` with the names of those that have not.
        """
        if not self._checked:
            self._checked = True
            missed = [n for n, p in self.learner.named_parameters() if p.requires_grad and p.grad is None]
            if missed:
                more = f" and {len(missed) - 5} others" if len(missed) > 5 else ""
                raise UserError(
                    f"no gradient reaches {', '.join(missed[:5])}{more}, on which what the encoder says does not "
                    "depend; use a strategy that leaves the encoder as it is (linear, frozen), or take them out of it"
                )

    def exported(self) -> Learner:
        """Encoder and head."""
        return self.learner

    def train(self, mode: bool = True) -> FineTuning:
        """As usual, but BatchNorm of frozen parts and the best state stay in `eval`."""
        super().train(mode)
        if mode:
            frozen = not any(p.requires_grad for p in self.learner.encoder.parameters())
            for norm in batch_norms(self.learner.encoder):
                own = [p.requires_grad for p in norm.parameters(recurse=False)]
                if frozen or (own and not any(own)):
                    norm.eval()
            if self.best is not None:
                self.best.eval()
        return self

    @torch.no_grad()
    def keep(self, learner: nn.Module) -> None:
        """Remember this state as the best so far."""
        assert self.best is not None
        pairs = zip(self.best.state_dict().values(), learner.state_dict().values(), strict=True)
        for kept, now in pairs:
            kept.copy_(now)

    def _loss(self, outputs: Tensor, truth: Tensor, shares: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        smoothing = self.views.label_smoothing if self.training else 0.0
        if self.weights is None and shares is None:
            return self.target.loss(outputs, truth, smoothing)
        goal = truth
        if shares is not None:
            partner, share = shares
            goal = mixed_targets(truth, partner, share, outputs.shape[1])
        total = F.cross_entropy(outputs, goal, weight=self.weights, reduction="sum", label_smoothing=smoothing)
        return total, torch.full((), float(len(truth)), device=outputs.device)


def balanced(samples: Samples, classes: int) -> Tensor:
    """Weights under which every class counts alike: float32 (classes,), with a mean of one over the samples."""
    counts = np.bincount(samples.labels, minlength=classes)
    return torch.from_numpy(len(samples) / (np.count_nonzero(counts) * np.maximum(counts, 1))).float()
