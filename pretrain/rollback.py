"""After too many bad steps in a row: back to a checkpoint, and past the samples since (PaLM, section 5.1)."""

from __future__ import annotations

from pathlib import Path

from pretrain import checkpoint
from pretrain.accelerator import on_main
from pretrain.session import Session


class RunFailed(Exception):
    """The run cannot go on; the message says why and what to do."""


def roll_back(session: Session, why: str) -> None:
    """Restore a checkpoint from before the bad steps, and leave out the samples between it and now.

    The next step of the restored state reads the samples behind the bad ones, so other data come where these
    led. Deterministic: a run killed between here and its next checkpoint meets the same bad steps again, and
    comes here again. The state's `left_out` lists the ranges of positions, [first, end).

    Raises:
        RunFailed: there is no such checkpoint, or the run was rolled back `train.rollbacks` times already.
    """
    job, run, state = session.job, session.run, session.job.state
    bad, reached, end = state.skipped, state.step, state.position
    left_out = [*state.extra.get("left_out", [])]
    session.saver.finish()
    target = None
    if len(left_out) < job.recipe.train.rollbacks:
        target = on_main(job.accelerator, lambda: _target(run.checkpoints, reached - bad))
    if target is None:
        raise RunFailed(
            f"{bad} steps in a row did not count ({why}), after {len(left_out)} roll-backs; {run.path / 'bad'} has the "
            "samples and the state: see headwater replay. Start again with another --output and a lower optimizer.lr, "
            "or with train.precision=bf16"
        )
    state.restore(target, job.recipe, job.facts)
    first = state.position
    event = {"step": state.step, "samples": first, "rolled_back_from": reached, "left_out": [first, end], "why": why}
    on_main(job.accelerator, lambda: run.rewind(state.step, event))
    state.extra["left_out"] = [*left_out, [first, end]]
    state.position, state.skipped = end, 0
    session.saved, session.saver.last = state.step, target
    session.line.say(
        f"step {reached:,}: {bad} steps in a row did not count ({why}); back to {target.name}, and past "
        f"{end - first:,} samples"
    )


def _target(folder: Path, first: int) -> Path | None:
    """The newest whole checkpoint from before the step `first + 1`, the first bad one; later ones are removed.

    One with a step to spare is preferred: from a checkpoint right before the bad steps, the same weights would
    only meet other samples.
    """
    whole = [path for path in reversed(checkpoint.complete(folder)) if checkpoint.problem(path) is None]
    fitting = [path for path in whole if checkpoint.step_of(path) < first]
    fitting += [path for path in whole if checkpoint.step_of(path) == first]
    if not fitting:
        return None
    checkpoint.go_back(fitting[0])
    return fitting[0]
