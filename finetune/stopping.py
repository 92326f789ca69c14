"""Early stopping: the best state on an inner split is kept, and training ends when it does not get better."""

from __future__ import annotations

import math

from finetune.judge import judge
from finetune.objective import FineTuning, Learner
from finetune.samples import Samples
from finetune.settings import Settings
from pretrain.job import Duties, Job

EVALUATIONS = 10
"""Looks at the inner split in a whole training."""


class EarlyStopping(Duties):
    """Judges `valid` now and then, if there is any; the test set is never seen here."""

    def __init__(self, job: Job, objective: FineTuning, valid: Samples | None, settings: Settings) -> None:
        """`objective` must keep its best state (`keeps_best`) where there are samples to judge it by."""
        self.job, self.objective, self.valid, self.settings = job, objective, valid, settings
        self.patience = settings.patience or EVALUATIONS
        """Evaluations without a better one after which training ends."""
        self.cadence = 0 if valid is None else math.ceil(job.steps / EVALUATIONS)

    def evaluate(self) -> dict[str, float]:
        """The merit and the loss on the inner split; the best (highest merit, then lowest loss) is kept."""
        assert self.valid is not None
        state, learner = self.job.state, self.learner()
        judged = judge(learner.encoder, learner.head, self.valid, self.settings, self.job.accelerator)
        self.objective.train()
        merit, loss = judged.merit, judged.loss if math.isfinite(judged.loss) else math.inf
        best = state.extra.get("best")
        if best is None or (merit, -loss) > (best["merit"], -best["loss"]):
            state.extra["best"] = {"step": state.step, "merit": merit, "loss": loss}
            self.objective.keep(learner)
        return {f"inner_{judged.target.merit}": merit, "inner_loss": loss}

    def over(self) -> bool:
        state = self.job.state
        best = state.extra.get("best")
        # What a stop has cut off is judged first.
        if best is None or state.extra.get("evaluated") != state.step:
            return False
        return bool(state.step - best["step"] >= self.patience * self.cadence)

    def learner(self) -> Learner:
        """Encoder and head as they are now: the average of their weights where one is kept."""
        learner = self.job.state.encoder()
        assert isinstance(learner, Learner)
        return learner

    def learned(self) -> Learner:
        """What training has led to: the best state where one was kept, else the last."""
        best = self.objective.best
        return self.learner() if best is None or "best" not in self.job.state.extra else best
