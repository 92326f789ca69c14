"""What pre-training does beside its steps: it probes the encoder, writes texts, and exports."""

from __future__ import annotations

from pathlib import Path

from pretrain.evaluate import cadence, evaluate
from pretrain.export import export, exported_step
from pretrain.job import Duties
from pretrain.setup import Setup
from pretrain.text_samples import write_samples
from pretrain.whole import collected, whole

EXPORT = "export"
"""Where in a run's folder its encoder is exported to."""


class Pretraining(Duties):
    """The duties of a run of `headwater pretrain`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.cadence = cadence(setup)

    def evaluate(self) -> dict[str, float]:
        return evaluate(whole(self.setup))

    def write(self, run: Path) -> list[str]:
        if not self.setup.recipe.watch.prompts:
            return []
        return write_samples(whole(self.setup), run)

    def finish(self, run: Path) -> None:
        setup, final = self.setup, collected(self.setup)
        if final is not None:
            export(setup.recipe, final, setup.data, run / EXPORT)

    def finished(self, run: Path, step: int) -> bool:
        return exported_step(run / EXPORT) == step
