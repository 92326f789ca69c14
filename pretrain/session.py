"""What happens between the steps of a run: metrics, evaluations, checkpoints, and stopping when told to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import UserError
from pretrain.accelerator import on_main
from pretrain.collapse import alarm
from pretrain.damage import count_damage
from pretrain.gradient import Sums
from pretrain.job import Duties, Job
from pretrain.pace import Pace
from pretrain.preemption import Preempted
from pretrain.progress import ProgressLine
from pretrain.run import RunFolder
from pretrain.saver import Saver
from pretrain.watchdog import Watchdog


@dataclass
class Session:
    """A run in progress on this process. All processes call the same methods at the same steps."""

    job: Job
    duties: Duties
    run: RunFolder
    line: ProgressLine
    saver: Saver
    watchdog: Watchdog
    saved: int | None
    """The step of the newest checkpoint, or of the one that is being written; None before the first."""
    pace: Pace = field(default_factory=Pace)
    reported: int = 0
    """Bad steps whose samples were noted, …"""
    dumped: int = 0
    """… and of those the ones whose state was kept too, since this start."""
    means: dict[str, float] = field(init=False)
    """Loss and metrics of the last step."""

    def __post_init__(self) -> None:
        self.means = self.job.state.extra.pop("means", {})

    def batches(self) -> Iterator[Any]:
        """This process's microbatches from where the state stands."""
        self.job.loader.position = self.job.state.position
        return iter(self.job.loader)

    def due(self, every: int) -> bool:
        """Whether something done `every` so many steps, and at the last, is to be done now; never for 0."""
        return bool(every) and (self.job.state.step % every == 0 or self.job.state.step == self.job.steps)

    def log(self, sums: Sums, seconds: float) -> None:
        """Note the step just taken, which took `seconds`, and say how it went where that is due."""
        watch, state = self.job.recipe.watch, self.job.state
        self.pace.add(seconds, sums.waited)
        self.watchdog.step(seconds)
        self.means = sums.means
        self.line.show(state.step, sums.means["loss"], self.pace)
        if self.due(watch.log_every) or self.due(watch.checkpoint_every) or any(sums.votes):
            for sentence in count_damage(self.job):
                self.line.say(f"step {state.step:,}: replaced a damaged sample: {sentence}")
        if self.due(watch.log_every) or sums.trouble:
            self.record(self._measured(sums))

    def evaluate(self) -> None:
        """Evaluate where that is due and not done; what a request to stop cuts short is done when the run goes on."""
        state = self.job.state
        if not self.due(self.duties.cadence) or state.extra.get("evaluated", 0) == state.step:
            return
        with self.watchdog.during("an evaluation"):
            values = self.duties.evaluate()
            for text in self.duties.write(self.run.path):
                self.line.say(f"step {state.step:,}: {text!r}")
        self.stop_if(self.job.preemption.agreed(self.job.accelerator))
        state.extra["evaluated"] = state.step
        if values:
            self.record(values)
            self.line.say(f"step {state.step:,}: " + ", ".join(f"{name} {v:.4f}" for name, v in values.items()))
            self._alarm(alarm(self.means | values))

    def save(self) -> None:
        """Begin to write a checkpoint; says what became of the one before."""
        state, preemption = self.job.state, self.job.preemption
        with self.watchdog.during("a save"):
            problem = self.saver.finish()
            if problem:
                self.line.say(f"{problem}; the run goes on, and would resume from {self._last}")
            self.saver.save(state.step, state.snapshot(self.job.recipe, self.job.facts))
        self.saved = state.step
        preemption.save_seconds = max(preemption.save_seconds, self.saver.seconds)
        facts = {"checkpoint": self.saver.last and self.saver.last.name, "problem": problem, "damaged": state.damaged}
        self.run.status("running", step=state.step, **{name: fact for name, fact in facts.items() if fact})

    def stop_if(self, reason: str | None) -> None:
        """Save and leave, all processes alike, where one has been asked to stop."""
        if reason is None:
            return
        self.job.state.extra["means"] = self.means
        if self.saved != self.job.state.step:
            self.save()
        with self.watchdog.during("a save"):
            problem = self.saver.finish()
        if problem:
            self.line.say(f"{problem}; the run will go on from {self._last}")
        self.job.preemption.obeyed()
        raise Preempted(reason)

    def finish(self) -> None:
        """Wait for the last checkpoint; raises `UserError`, everywhere, when it could not be written."""
        self.line.end()
        with self.watchdog.during("a save"):
            on_main(self.job.accelerator, self._written)

    def record(self, values: dict[str, float]) -> None:
        """To metrics.jsonl and to the trackers."""
        self.run.record({"step": self.job.state.step, "samples": self.job.state.position} | values)
        self.job.accelerator.log(values, step=self.job.state.step)

    def _alarm(self, text: str | None) -> None:
        """Say so wherever one looks when features have collapsed, and take it back when they have recovered."""
        self.run.alarm, self.line.alarm = text, text is not None
        if text:
            self.run.record({"step": self.job.state.step, "samples": self.job.state.position, "alarm": text})
            self.line.say(f"step {self.job.state.step:,}: {text}")

    @property
    def _last(self) -> Path | str:
        return self.saver.last or "where it started"

    def _measured(self, sums: Sums) -> dict[str, float]:
        """One line of metrics.jsonl about the step just taken."""
        state = self.job.state
        values = {
            "epoch": state.position / self.job.samples,
            **sums.means,
            "gradient_norm": sums.norm,
            "lr": max(group["lr"] for group in state.optimizer.param_groups),
            "samples_per_second": self.pace.rate * self.job.loader.batch_size,
            "data_wait": self.pace.waiting,
        }
        if state.damaged:
            values["damaged"] = state.damaged
        return values | {"skipped": state.skipped} if sums.trouble else values

    def _written(self) -> None:
        problem = self.saver.finish()
        if problem:
            raise UserError(f"{problem}; make room, then the same command goes on from the checkpoint before")
