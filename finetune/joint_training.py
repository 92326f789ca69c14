"""Training several tasks' heads and one encoder together."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from data.errors import UserError
from data.requests import Share
from finetune.encoder import Encoder
from finetune.heads import LinearHead
from finetune.job import make_job, steps_for
from finetune.judge import judge
from finetune.mixed_loader import MixedBatch, MixedLoader
from finetune.objective import FineTuning, Learner, Views, balanced
from finetune.samples import Samples
from finetune.settings import Settings
from finetune.train import Training
from pretrain.job import Duties
from pretrain.loop import run_in_memory
from pretrain.objectives.protocol import Output, Tensors
from pretrain.rollback import RunFailed


class MultiTask(FineTuning):
    """The sum of several tasks' losses over one encoder; each sample counts alike, whatever its task."""

    def __init__(self, encoder: Encoder, heads: Mapping[str, LinearHead], members: Mapping[str, FineTuning]) -> None:
        """`members` are the tasks' objectives around `encoder` and their own head."""
        learner = Learner(encoder, nn.ModuleDict(heads))  # type: ignore[arg-type]
        super().__init__(learner, next(iter(members.values())).target, Views())
        self.members = nn.ModuleDict(members)

    def forward(self, batch: MixedBatch, progress: float) -> Output:  # type: ignore[override]
        """The loss of one microbatch that holds samples of some of the tasks."""
        outputs = {name: self.members[name](part, progress) for name, part in batch.parts.items()}
        loss = torch.stack([output.loss_sum for output in outputs.values()]).sum()
        count = torch.stack([output.target_count for output in outputs.values()]).sum()
        return Output(loss, count)

    def after_step(self, progress: float, statistics: Tensors) -> None:
        """Nothing: a task without a sample in the first batch rightly has no gradient yet."""


@dataclass(frozen=True)
class JointTraining:
    """One multi-task training: everything that stays the same while learning rates are tried."""

    encoder: Encoder
    samples: Mapping[str, Samples]
    shares: Mapping[str, int]
    seed: int
    settings: Settings
    accelerator: Accelerator

    def fit(self, candidates: Sequence[float]) -> tuple[Encoder, dict[str, LinearHead], dict[str, Any]]:
        """Shared encoder, each task's head, and what was chosen.

        The steps are those of all tasks trained alone together. Without a set learning rate each of the `candidates`
        is tried on inner splits of these same labels: the best has the highest mean merit over the tasks
        (each a share of 1, whatever the kind of task).

        Raises:
            UserError: the learning rate led nowhere.
        """
        lr, trials = self.settings.lr, {}
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            if lr is None:
                trials = self._try(candidates)
                lr = max(trials, key=lambda rate: trials[rate]) if trials else candidates[len(candidates) // 2]
            try:
                encoder, heads, steps = self._train(self.samples, lr)
            except RunFailed as error:
                raise UserError(f"multi-task training diverged at {lr:g} ({error}); set a lower rate (lr=…)") from None
        self.accelerator.free_memory()
        chosen: dict[str, Any] = {"lr": lr, "steps": steps, "shares": dict(self.shares)}
        if trials:
            chosen["inner_merit"] = {f"{rate:g}": merit for rate, merit in trials.items()}
        return encoder, heads, chosen

    def _try(self, candidates: Sequence[float]) -> dict[float, float]:
        splits = {name: self._alone(samples).split() for name, samples in self.samples.items()}
        valid = {name: held for name, (_, held) in splits.items() if held is not None}
        trials: dict[float, float] = {}
        for lr in candidates if valid else ():
            try:
                encoder, heads, _ = self._train({name: inner for name, (inner, _) in splits.items()}, lr)
            except RunFailed:
                continue
            found = [judge(encoder, heads[n], held, self.settings, self.accelerator) for n, held in valid.items()]
            if all(math.isfinite(each.loss) for each in found):
                # A merit below 0 (R² of a model worse than the mean) must not outweigh what the other tasks say.
                trials[lr] = float(np.mean([max(0.0, each.merit) for each in found]))
        return trials

    def _alone(self, samples: Samples) -> Training:
        start = partial(copy_of, self.encoder)
        return Training(start, samples, samples.target.outputs, self.seed, self.settings, self.accelerator)

    def _train(self, samples: Mapping[str, Samples], lr: float) -> tuple[Encoder, dict[str, LinearHead], int]:
        settings, encoder = self.settings, copy_of(self.encoder)
        heads = {name: self._alone(each).first_head(encoder, each) for name, each in samples.items()}
        members = {}
        for name, each in samples.items():
            weights = balanced(each, each.target.outputs) if settings.balance else None
            members[name] = FineTuning(Learner(encoder, heads[name]), each.target, Views.of(settings), weights)
        objective = MultiTask(encoder, heads, members)
        first = next(iter(samples.values()))
        steps = sum(steps_for(len(each), settings) for each in samples.values())
        job = make_job(objective, first, lr, self.seed, settings, self.accelerator)
        share = Share(self.accelerator.process_index, self.accelerator.num_processes, settings.microbatch, lanes=1)
        loader = MixedLoader(samples, self.shares, settings.batch_size, self.seed, share, settings.augmentation)
        total = sum(len(each) for each in samples.values())
        run_in_memory(dataclasses.replace(job, loader=loader, steps=steps, samples=total), Duties())
        return encoder.eval(), {name: head.eval() for name, head in heads.items()}, steps


def copy_of(encoder: Encoder) -> Encoder:
    """A copy whose weights are all trained."""
    return copy.deepcopy(encoder).requires_grad_(True)
