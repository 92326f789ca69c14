"""Runs single cells: one strategy on one set of labels, judged on the test set."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune.advise.bank import FeatureBank
from finetune.advise.budgets import fitting
from finetune.advise.cells import Arm, Cell
from finetune.advise.clock import SAFETY, Clock, guarded
from finetune.encoder import Encoder, fresh
from finetune.evidence import score
from finetune.features import accelerator_for
from finetune.model import TaskModel
from finetune.samples import Ints, Samples
from finetune.settings import Settings
from finetune.strategies import FROZEN, WAYS, fit_frozen, fit_trained, strategy_from
from finetune.tasks import Task

PROBE_STEPS = 2
"""Training steps by which the cost of the first trained cell is told."""


@dataclass(frozen=True)
class Subject:
    """An encoder, and the task as it reads it."""

    encoder: Encoder
    task: Task


class Runner:
    """Everything that cells share."""

    def __init__(
        self, subjects: dict[str, Subject], settings: Settings, clock: Clock, folder: Path | None = None
    ) -> None:
        """`subjects` by the arms' weights: `pre-trained`, and `second` where there is one; features go to `folder`."""
        self._folder = folder
        self.subjects, self.settings, self.clock = subjects, settings, clock
        self.accelerator = accelerator_for(settings)
        self._banks: dict[tuple[str, int], FeatureBank] = {}
        self.fitting = 0.0
        """Seconds of the last cell without the features that others may have left it."""

    def run(self, arm: Arm, positions: Ints, seed: int) -> Cell:
        """Fit on the training samples at `positions` and judge.

        Trained strategies begin from features that frozen ones have left.

        Raises:
            OutOfTime: the clock ran down; nothing is kept.
            UserError: training diverged.
        """
        task = self._subject(arm).task
        chosen: dict[str, Any] = {}
        if arm.strategy == "majority":
            probabilities, seconds = _majority(task, positions), 0.0
            self.fitting = 0.0
        elif arm.strategy in FROZEN:
            probabilities, chosen, seconds = self._frozen(arm, positions, seed)
        else:
            probabilities, chosen, seconds = self._trained(arm, positions, seed)
        judged = score(probabilities, task.test.labels)
        return Cell(arm.name, len(positions), seed, judged.correct, judged.macro_f1, seconds, chosen)

    def to_extract(self, arm: Arm, positions: Ints, seed: int) -> float:
        """Seconds for the features that a frozen cell needs and that are not there yet."""
        rates = [bank.seconds_each for bank in self._banks.values() if bank.seconds_each]
        return SAFETY * max(rates, default=0.0) * self._bank(arm, seed).missing(positions)

    def probe(self, arm: Arm, positions: Ints) -> float:
        """Seconds a training sample takes, from a few steps that are thrown away."""
        few = self.settings.model_copy(update={"lr": 1e-9, "min_steps": PROBE_STEPS, "epochs": 1e-9})
        subject, seconds = self._subject(arm), []
        for steps in (PROBE_STEPS, 2 * PROBE_STEPS):
            settings = few.model_copy(update={"min_steps": steps})
            started = time.perf_counter()
            self._fit(arm, subject, positions, 0, settings)
            seconds.append(time.perf_counter() - started)
        batch = fitting(self.settings, len(positions)).batch_size
        # The first run also warms up; where the difference drowns in noise, the second's whole time counts.
        steps = PROBE_STEPS if seconds[1] - seconds[0] > 0.25 * seconds[1] else 2 * PROBE_STEPS
        return (seconds[1] - seconds[0] if steps == PROBE_STEPS else seconds[1]) / (steps * batch)

    def _frozen(self, arm: Arm, positions: Ints, seed: int) -> tuple[np.ndarray, dict[str, Any], float]:
        bank, task = self._bank(arm, seed), self._subject(arm).task
        features, judged = bank.at(positions), bank.of_test()
        started = time.perf_counter()
        labels = torch.from_numpy(task.train.labels[positions])
        strategy = strategy_from(arm.strategy)
        model = fit_frozen(strategy, bank.encoder, features, labels, task.classes, seed, self.settings)
        probabilities = model.from_features(judged).numpy()
        # As if nobody else shared the features: what this cell would cost alone.
        alone = (bank.seconds_each or 0.0) * (len(positions) + len(judged))
        self.fitting = time.perf_counter() - started
        return probabilities, model.about["chosen"], self.fitting + alone

    def _trained(self, arm: Arm, positions: Ints, seed: int) -> tuple[np.ndarray, dict[str, Any], float]:
        subject, alone = self._subject(arm), 0.0
        if WAYS[strategy_from(arm.strategy)].kept:
            bank = self._bank(arm, seed)
            bank.at(positions)
            alone = (bank.seconds_each or 0.0) * len(positions)
        started = time.perf_counter()
        model = self._fit(arm, subject, positions, seed, self.settings)
        probabilities = model.probabilities(self._watched(subject.task.test), self.settings).numpy()
        self.fitting = time.perf_counter() - started
        # As if no other cell had left it features.
        return probabilities, model.about["chosen"], self.fitting + alone

    def _fit(self, arm: Arm, subject: Subject, positions: Ints, seed: int, settings: Settings) -> TaskModel:
        samples = self._watched(subject.task.train.select(positions))
        strategy = strategy_from(arm.strategy)
        encoder, classes = subject.encoder, subject.task.classes
        known = self._bank(arm, seed).of if WAYS[strategy].kept else None
        settings = fitting(settings, len(positions))
        return fit_trained(strategy, encoder, samples, classes, seed, settings, self.accelerator, known=known)

    def _watched(self, samples: Samples) -> Samples:
        return guarded(samples, self.clock)

    def _subject(self, arm: Arm) -> Subject:
        return self.subjects["second" if arm.weights == "second" else "pre-trained"]

    def _bank(self, arm: Arm, seed: int) -> FeatureBank:
        # Untrained weights are drawn anew for each seed: one draw may be lucky.
        key = (arm.weights, seed if arm.weights == "untrained" else 0)
        if key not in self._banks:
            subject = self._subject(arm)
            encoder = fresh(subject.encoder, seed) if arm.weights == "untrained" else subject.encoder
            path = None if self._folder is None else self._folder / f"{arm.weights}-{key[1]}.safetensors"
            train, test = self._watched(subject.task.train), self._watched(subject.task.test)
            self._banks[key] = FeatureBank(encoder, train, test, self.settings, self.accelerator, path)
        return self._banks[key]


def _majority(task: Task, positions: Ints) -> np.ndarray:
    """Always the class that is commonest among the labels; the first of equally common ones."""
    counts = np.bincount(task.train.labels[positions], minlength=len(task.classes))
    return np.tile(np.eye(len(counts), dtype=np.float32)[counts.argmax()], (len(task.test), 1))
