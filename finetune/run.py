"""Fine-tune, judge on the test set, save: what `headwater finetune` does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError
from finetune.encoder import Encoder, load_encoder
from finetune.features import accelerator_for
from finetune.model import TaskModel, claim, publish
from finetune.results import write_results
from finetune.settings import settings_from
from finetune.strategies import FROZEN, strategy_from
from finetune.study import Study, study
from finetune.study_classes import ClassCases
from finetune.study_targets import TargetCases
from finetune.targets import task_from
from finetune.tasks import Report, Task, load_task
from finetune.train import CHOICE, Trace
from pretrain.accelerator import on_main


def finetune(
    source: str | Path | Encoder,
    train: str | Path | Task,
    test: str | Path | None = None,
    *,
    task: str = "classification",
    strategy: str = "linear",
    labels_per_class: int | None = None,
    seeds: Sequence[int] = (0,),
    output: str | Path | None = None,
    overwrite: bool = False,
    resume: str = "auto",
    report: Report = print,
    **settings: Any,
) -> dict[str, Any]:
    """Learn the task from few labels, once a seed, and judge every result on the same test set.

    Args:
        source: an export's folder, or an encoder already in memory (a control, for example).
        train: labelled data, see `load_task`; or a task already loaded, for several calls in a row.
        test: labelled data of the same classes; without it 20 % of the training data is held out.
        strategy: one of `finetune.settings.STRATEGIES`.
        labels_per_class: the label budget; a seed draws the same labels whatever the strategy, and the
            labels of a smaller budget are among those of a larger one. All labels without it.
        output: a folder for `results.json` and the model of the first seed; nothing is saved without it.
            A strategy that trains then leaves checkpoints and metrics of that model in `OUTPUT.run` until it has
            ended, and the same call goes on from there. Several processes call this together (`accelerate launch`).
        resume: `auto`, or `never` to begin anew where `OUTPUT.run` holds an earlier try.
        settings: see `finetune.settings.Settings`.

    Returns:
        What `results.json` holds.

    Raises:
        UserError: anything the caller can put right; nothing is left half-written.
        Preempted: asked to stop while the model to be saved was trained; what it had done is in `OUTPUT.run`.
    """
    chosen, options = strategy_from(strategy), settings_from(settings)
    kind = task_from(task)
    if not seeds or (labels_per_class is not None and labels_per_class < 1):
        raise UserError("fine-tuning needs one seed or more and one label a class or more")
    accelerator = accelerator_for(options)
    report = report if accelerator.is_main_process else _silent
    place = None if output is None else Path(output).expanduser()
    hidden = None if place is None else on_main(accelerator, lambda: claim(place, overwrite))
    trace = None if place is None or chosen in FROZEN else Trace(place.with_name(f"{place.name}.run"))
    if trace is not None and resume == "never":
        on_main(accelerator, lambda: shutil.rmtree(trace.folder, ignore_errors=True))
    try:
        encoder = source if isinstance(source, Encoder) else load_encoder(source, options.pooling)
        if hidden is not None and encoder.folder is None:
            raise UserError("a control without weights cannot be saved as a model; leave the output out")
        data = train if isinstance(train, Task) else load_task(train, test, encoder, kind)
        plan = Study(encoder, data, chosen, labels_per_class, seeds, options)
        if data.target.name == "classification":
            results, first = study(ClassCases, plan, report, trace)
        else:
            results, first = study(TargetCases, plan, report, trace)
        if hidden is not None and place is not None:
            on_main(accelerator, lambda: _publish(first, results, hidden, place, trace))
    finally:
        if hidden is not None and accelerator.is_main_process:
            shutil.rmtree(hidden, ignore_errors=True)
    return results


def _publish(model: TaskModel, results: dict[str, Any], hidden: Path, place: Path, trace: Trace | None) -> None:
    """Everything under its name at once; of a run with a folder its records move in, its checkpoints go."""
    model.save(hidden)
    write_results(hidden / "results.json", results)
    if trace is not None:
        leave = shutil.ignore_patterns("checkpoints", ".*", CHOICE)
        shutil.copytree(trace.folder, hidden / "run", ignore=leave)
    publish(hidden, place)
    if trace is not None:
        shutil.rmtree(trace.folder)


def _silent(_: str) -> None:
    pass
