"""What the loop trains: a setting, a state, a loader; and what a kind of job does between its steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from data.requests import Share
from pretrain.preemption import Preemption
from pretrain.recipe import RunRecipe
from pretrain.state import TrainingState


class Batches(Protocol):
    """This process's microbatches, by position: see `data.loader.Loader`."""

    share: Share
    position: int

    @property
    def batch_size(self) -> int:
        """Samples of the next global batch."""

    @property
    def tolerance(self) -> int:
        """Damaged samples that all processes together may replace."""

    def __iter__(self) -> Iterator[Any]:
        """Microbatches, for ever, from `position` on."""

    def take_damage(self) -> tuple[int, list[str]]:
        """How many damaged samples were replaced since the last call, and what was wrong with some."""


@dataclass
class Job:
    """The parts of a training on this process."""

    recipe: RunRecipe
    """Resolved: nothing in it is left open."""
    accelerator: Accelerator
    state: TrainingState
    """What changes from step to step, and is saved."""
    model: nn.Module
    """`state.objective` as it is called: wrapped for several processes and mixed precision."""
    loader: Batches
    steps: int
    """Optimiser steps of the whole run."""
    preemption: Preemption
    """Whether the run has been asked to stop."""
    samples: int
    """Of one epoch."""
    facts: dict[str, Any]
    """What a checkpoint must agree with to be resumed: which samples there are, not where they lie."""

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return bool(self.accelerator.is_main_process)


class Duties:
    """What a kind of job does beside its steps, by default nothing. All processes call each at the same steps."""

    cadence: int = 0
    """Steps between two evaluations, one at the end included; 0 for never."""

    def evaluate(self) -> dict[str, float]:
        """What is measured at an evaluation, for metrics.jsonl."""
        return {}

    def write(self, run: Path) -> list[str]:
        """Texts to show at an evaluation; they may be kept in the run's folder."""
        return []

    def over(self) -> bool:
        """Whether the run ends here, before its last step."""
        return False

    def finish(self, run: Path) -> None:
        """Hand over what was learnt, after the last step."""

    def finished(self, run: Path, step: int) -> bool:
        """Whether what was learnt up to `step` is handed over already; asked on the main process alone."""
        return True
