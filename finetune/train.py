"""Training encoder and head together, by pretrain's loop: in memory, or as a run with a folder that resumes."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from data.errors import UserError
from data.files import write_atomically
from finetune.encoder import Encoder
from finetune.heads import LinearHead
from finetune.job import fingerprint, make_job, steps_for, weights_digest
from finetune.judge import flat_features, judge
from finetune.loader import keyed_order
from finetune.objective import FineTuning, Learner, Views, balanced
from finetune.samples import Samples
from finetune.settings import Settings
from finetune.splits import folds
from finetune.stopping import EarlyStopping
from pretrain.accelerator import on_main
from pretrain.loop import run, run_in_memory
from pretrain.rollback import RunFailed

TRIED = 2000
"""Labels on which learning rates are compared at most."""
CHOICE = "choice.json"
"""In a run's folder: the learning rate that was chosen, so that a run which goes on need not choose again."""
_STANDARD = (256, 2048)
"""Least and most samples over which the head's input is standardised. The encoder computes them before the first step;
with 256 a deviation is off by about 4 %, which is that much in how fast the head's weights learn."""
_STANDARD_SHARE = 20
"""Between these, one sample for so many that training will see: some 2 % of the time of a fit."""


@dataclass(frozen=True)
class Trace:
    """A fit that writes checkpoints, metrics and its status, and goes on from where it was killed."""

    folder: Path


@dataclass(frozen=True)
class Training:
    """One strategy on one set of labels: everything that stays the same while learning rates are tried."""

    start: Callable[[], Encoder]
    """Makes the encoder to be trained, with the weights training begins from."""
    samples: Samples
    classes: int
    seed: int
    settings: Settings
    accelerator: Accelerator
    head: Callable[[Encoder, Samples], LinearHead] | None = None
    """Makes the head that training begins from, out of the samples that this training sees; a small random one
    without."""
    before_step: Callable[[Encoder, float], None] | None = None
    """Called before each step with the encoder in training and the step's progress in (0, 1): to unfreeze gradually,
    for example. Parameters that are to be trained at some time need `requires_grad` at the start."""
    known: Callable[[Samples], Tensor] | None = None
    """Pooled features (n, d) of samples by the encoder that training begins from, where they are known already."""
    trace: Trace | None = None
    """Of the last fit, on all labels. All other fits, and this one without it, leave no trace."""
    heads: dict[bytes, LinearHead] = field(default_factory=dict, repr=False)
    """Those that trainings began from, by the samples: every learning rate begins from the same."""

    def fit(self, candidates: tuple[float, ...]) -> tuple[Encoder, LinearHead, dict[str, Any]]:
        """Trained encoder and head, and what was chosen.

        Without a set learning rate each of the `candidates` is tried on an inner split of these same
        labels (highest merit, then lowest loss); where no class has two, the middle one is taken. With
        `patience` the last fit too holds an inner split out, and keeps the state that was best on it.
        Deterministic for a seed; the process-wide random state stays as it was. In several processes all
        call this together.

        Raises:
            UserError: no rate, or the one that was set, led anywhere; or the folder belongs to another fit.
            Preempted: the run with a folder was asked to stop, and what it had done is saved.
        """
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            set_rate = self.settings.lr
            lr, trials = self._choose(candidates) if set_rate is None else (set_rate, {})
            inner, valid = self.split(self.samples) if self.settings.patience else (self.samples, None)
            try:
                duties = self._train(inner, valid, lr, self.trace)
            except RunFailed as error:
                raise UserError(
                    f"fine-tuning diverged at a learning rate of {lr:g} ({error}); set a lower one (lr=…)"
                ) from None
        learned = duties.learned().eval()
        self.accelerator.free_memory()
        chosen: dict[str, Any] = {"lr": lr, "steps": duties.job.state.step}
        if trials:
            chosen[f"inner_{self.samples.target.merit}"] = {f"{rate:g}": merit for rate, (merit, _) in trials.items()}
        if "best" in duties.job.state.extra:
            chosen["best"] = duties.job.state.extra["best"]
        return learned.encoder, learned.head, chosen

    def _choose(self, candidates: tuple[float, ...]) -> tuple[float, dict[float, tuple[float, float]]]:
        """The best rate and what each was worth; from the folder where that is known."""
        known = None if self.trace is None else self.trace.folder / CHOICE
        key = "" if known is None else self._key(candidates)
        if known is not None:
            found = on_main(self.accelerator, lambda: _read_choice(known, key))
            if found is not None:
                return found["lr"], {float(rate): tuple(worth) for rate, worth in found["trials"]}
        trials = self._try(candidates)
        best = max(trials, key=lambda rate: trials[rate]) if trials else candidates[len(candidates) // 2]
        # What is decided on the main process holds for all.
        lr = on_main(self.accelerator, lambda: best)
        if known is not None and self.accelerator.is_main_process:
            known.parent.mkdir(parents=True, exist_ok=True)
            choice = {"key": key, "lr": lr, "trials": [[rate, list(worth)] for rate, worth in trials.items()]}
            write_atomically(known, json.dumps(choice))
        return lr, trials

    def _key(self, candidates: tuple[float, ...]) -> str:
        """What a choice of the rate depends on."""
        settings = self.settings.model_dump(mode="json")
        facts = [settings, self.seed, list(candidates), weights_digest(self.start()), fingerprint(self.samples)]
        return json.dumps(facts, sort_keys=True)

    def _try(self, candidates: tuple[float, ...]) -> dict[float, tuple[float, float]]:
        """(merit, -loss) of each rate on a quarter of the labels; {} where they are too few to split."""
        inner, valid = self.split()
        trials: dict[float, tuple[float, float]] = {}
        for lr in candidates if valid is not None else ():
            assert valid is not None
            try:
                duties = self._train(inner, valid if self.settings.patience else None, lr, None, self.settings.trial)
            except RunFailed:
                continue
            learned = duties.learned()
            judged = judge(learned.encoder, learned.head, valid, self.settings, self.accelerator)
            if math.isfinite(judged.loss):
                trials[lr] = (judged.merit, -judged.loss)
        return trials

    def split(self, samples: Samples | None = None) -> tuple[Samples, Samples | None]:
        """Three quarters to train on and a quarter to judge by; all and None where no class has two.

        Of `samples`, or of at most `TRIED` of all.
        """
        if samples is None:
            samples = self.samples
            if len(samples) > TRIED:
                samples = samples.select(np.sort(keyed_order(len(samples), self.seed, 0)[:TRIED]))
        count = min(4, int(np.bincount(samples.labels).max()))
        if count < 2:
            return samples, None
        number = folds(samples.labels, count, self.seed)
        inside, outside = np.flatnonzero(number != 0), np.flatnonzero(number == 0)
        return (samples.select(inside), samples.select(outside)) if len(outside) else (samples, None)

    def _train(
        self, samples: Samples, valid: Samples | None, lr: float, trace: Trace | None, settings: Settings | None = None
    ) -> EarlyStopping:
        """One fit to its end; `valid` stops it early. Raises `RunFailed` where it diverged."""
        settings = settings or self.settings
        encoder = self.start()
        learner = Learner(encoder, self.first_head(encoder, samples))
        weights = balanced(samples, self.classes) if settings.balance else None
        objective = FineTuning(
            learner, samples.target, Views.of(settings), weights, self.before_step, keeps_best=valid is not None
        )
        try:
            job = make_job(
                objective, samples, lr, self.seed, settings, self.accelerator, trace.folder if trace else None
            )
            duties = EarlyStopping(job, objective, valid, settings)
            if trace is None:
                run_in_memory(job, duties)
            else:
                run(job, duties, trace.folder)
        finally:
            if objective.depth is not None:
                objective.depth.remove()
        return duties

    def first_head(self, encoder: Encoder, samples: Samples) -> LinearHead:
        """The given head, or a small random one behind the features as they are now, standardised.

        That over a keyed draw of the samples, which depends on their number, the seed and the length of training alone.
        """
        key = samples.ids.tobytes()
        if key not in self.heads:
            self.heads[key] = self._make_head(encoder, samples)
        return copy.deepcopy(self.heads[key])

    def _make_head(self, encoder: Encoder, samples: Samples) -> LinearHead:
        if self.head is not None:
            return self.head(encoder, samples)
        width = encoder.token_features if samples.target.dense else encoder.features
        head = LinearHead(width, self.classes, seed=self.seed)
        seen = steps_for(len(samples), self.settings) * self.settings.batch_size
        most = min(max(seen // _STANDARD_SHARE, _STANDARD[0]), _STANDARD[1])
        first = samples.select(np.sort(keyed_order(len(samples), self.seed, 0)[:most]))
        if self.known is not None:
            head.standardize(self.known(first))
        else:
            head.standardize(flat_features(encoder, first, self.settings, self.accelerator)[0])
        return head


def _read_choice(path: Path, key: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if found.get("key") == key else None
