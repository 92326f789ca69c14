"""What is kept of bad steps in RUN/bad: which samples, what came of them, and the state, for `headwater replay`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from data.files import write_atomically
from pretrain.checkpoint import Retention
from pretrain.gradient import Sums
from pretrain.saver import Saver
from pretrain.session import Session

MOST_STATES = 4
"""States kept in one start of a run; each is as large as a checkpoint."""
MOST_REPORTS = 50
"""Steps reported on in one start of a run."""


def keep_evidence(session: Session, sums: Sums) -> None:
    """Report on the bad step just taken, and, with the first of several in a row, keep the state from before it.

    All processes call it. A loss scaler's overflow alone is no evidence: lowering the scale answers it. A disk
    that is full keeps nothing and stops nothing.
    """
    state = session.job.state
    overflow = state.scaler is not None and math.isfinite(sums.loss) and not math.isfinite(sums.norm)
    if overflow or session.reported >= MOST_REPORTS:
        return
    session.reported += 1
    folder = session.run.path / "bad" / f"step-{state.step:09d}"
    everyone = gather_object([_process(session, sums)])
    report = {
        "step": state.step,
        "why": sums.trouble,
        "loss": sums.means["loss"],
        "gradient_norm": sums.norm,
        "position": state.position - sums.samples,
        "epoch": state.position / session.job.samples,
        "processes": everyone,
    }
    if session.job.main:
        _write(session, folder, report)
    if state.skipped == 1 and session.dumped < MOST_STATES:
        session.dumped += 1
        _dump(session, folder, sums)


def _process(session: Session, sums: Sums) -> dict[str, Any]:
    return {
        "process": session.job.accelerator.process_index,
        "loss_sum": sums.mine,
        "ids": [number for ids, _ in sums.seen for number in ids.tolist()],
        "keys": [number for _, keys in sums.seen for number in keys.tolist()],
    }


def _write(session: Session, folder: Path, report: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.json", json.dumps(report))
    except OSError as error:
        session.line.say(f"{folder} cannot be written ({error}); the run goes on")


def _dump(session: Session, folder: Path, sums: Sums) -> None:
    """The state before the step: nothing has changed since but the counts."""
    job = session.job
    snapshot = job.state.snapshot(job.recipe, job.facts)
    before = {"step": job.state.step - 1, "position": job.state.position - sums.samples, "skipped": 0}
    snapshot.state.update(before)
    accelerator = job.accelerator
    saver = Saver(folder, Retention(1), accelerator.process_index, accelerator.num_processes, "bad", background=False)
    saver.save(job.state.step - 1, snapshot)
    if saver.problem:
        session.line.say(f"{saver.problem}; the run goes on without this evidence")
