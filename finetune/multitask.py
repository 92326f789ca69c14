"""Several tasks over one shared encoder, trained together (Caruana 1997), beside each task trained alone."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from data.errors import UserError
from data.requests import Share
from finetune.compare import Judged, lead
from finetune.encoder import Encoder, load_encoder
from finetune.evidence import interval
from finetune.features import accelerator_for
from finetune.heads import LinearHead
from finetune.job import make_job, steps_for
from finetune.judge import judge
from finetune.mixed_loader import MixedBatch, MixedLoader, sampling_shares
from finetune.model import TaskModel
from finetune.objective import FineTuning, Learner, Views, balanced
from finetune.rates import learning_rates
from finetune.results import FORMAT, describe_encoder, describe_task, write_results
from finetune.samples import Samples
from finetune.saving import written
from finetune.settings import Settings, settings_from
from finetune.splits import subset
from finetune.tasks import Report, Task, load_task, settle
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
        is tried on inner splits of these same labels: the best has the highest mean merit over the tasks.

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
                trials[lr] = float(np.mean([each.merit for each in found]))
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


def multitask(
    source: str | Path | Encoder,
    tasks: Mapping[str, tuple[str | Path, str | Path | None] | Task],
    *,
    sampling: str = "proportional",
    temperature: float = 2.0,
    labels_per_class: int | None = None,
    seeds: Sequence[int] = (0,),
    output: str | Path | None = None,
    overwrite: bool = False,
    report: Report = print,
    **settings: Any,
) -> dict[str, Any]:
    """Train several tasks over one encoder, and each alone, with the same number of steps in all.

    Args:
        source: an export's folder, or an encoder.
        tasks: for each name (training data, test data or None), see `load_task`; or a task already loaded.
        sampling: how often each task's samples come, see `sampling_shares`.
        output: folder for `results.json` and, below each task's name, a model of the shared encoder and its head
            (of the first seed).

    Returns:
        For each task the accuracy of `joint` and of `alone`, and the paired `lead` of the former.

    Raises:
        UserError: data or settings that do not fit; nothing is left half-written.
    """
    options, started = settings_from(settings), time.perf_counter()
    _check(tasks, seeds, options)
    with written(output, overwrite) as folder:
        encoder = source if isinstance(source, Encoder) else load_encoder(source, options.pooling)
        data = {n: t if isinstance(t, Task) else load_task(*t, encoder) for n, t in tasks.items()}
        for task in data.values():
            settle(task.train, report)
            settle(task.test, report)
        accelerator, rates = accelerator_for(options), learning_rates(encoder.info)
        correct: dict[str, dict[str, list[np.ndarray]]] = {name: {"joint": [], "alone": []} for name in data}
        choices = []
        for seed in seeds:
            samples = {n: t.train.select(subset(t.train.labels, labels_per_class, seed)) for n, t in data.items()}
            shares = sampling_shares({name: len(each) for name, each in samples.items()}, sampling, temperature)
            joint = JointTraining(encoder, samples, shares, seed, options, accelerator)
            trained, heads, chosen = joint.fit(rates)
            choices.append({"seed": seed} | chosen)
            for name, task in data.items():
                about = {"strategy": "multitask", "seed": seed, "labels": len(samples[name]), "chosen": chosen}
                model = TaskModel(trained, heads[name], task.classes, about)
                single = Training(
                    partial(copy_of, encoder), samples[name], len(task.classes), seed, options, accelerator
                ).fit(rates)
                for how, each in (("joint", model), ("alone", TaskModel(single[0], single[1], task.classes))):
                    judged = Judged(how, each.probabilities(task.test, options).numpy(), task.test.labels)
                    correct[name][how].append(judged.score.correct)
                    report(f"{name}, {how}, seed {seed}: accuracy {100 * judged.score.accuracy:.1f} %")
                if folder is not None and seed == seeds[0]:
                    model.about["encoder"] = describe_encoder(encoder)
                    model.save(folder.hidden / name)
        results: dict[str, Any] = {"format": FORMAT, "sampling": sampling, "runs": choices}
        results["tasks"] = {n: describe_task(data[n]) | _compared(each) for n, each in correct.items()}
        results |= {"encoder": describe_encoder(encoder), "settings": options.model_dump(mode="json")}
        results["seconds"] = round(time.perf_counter() - started, 3)
        if folder is not None:
            write_results(folder.hidden / "results.json", results)
    return results


def _compared(correct: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    rows = {how: np.stack(each) for how, each in correct.items()}
    found: dict[str, Any] = {
        how: {"accuracy": float(each.mean()), "interval": list(interval(each))} for how, each in rows.items()
    }
    return found | {"lead": lead(rows["joint"], rows["alone"])}


def _check(tasks: Mapping[str, Any], seeds: Sequence[int], settings: Settings) -> None:
    if not tasks or not seeds:
        raise UserError("multi-task training needs one task or more and one seed or more")
    for name in tasks:
        if not name or set(name) & set("/\\.") or name == "results":
            raise UserError(f"{name!r} names no task; use letters, digits, '-' and '_'")
    for name in ("patience", "drop_path", "ema"):
        if getattr(settings, name) is not None:
            raise UserError(f"{name} is for one task; leave it out of multi-task training")
