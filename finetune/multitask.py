"""Several tasks over one shared encoder, trained together (Caruana 1997), beside each task trained alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.errors import UserError
from finetune.compare import Judged, judge_model
from finetune.encoder import Encoder, load_encoder
from finetune.features import accelerator_for
from finetune.joint_training import JointTraining, copy_of
from finetune.mixed_loader import sampling_shares
from finetune.model import TaskModel
from finetune.rates import learning_rates
from finetune.results import FORMAT, describe_data, describe_encoder, describe_task, kind_of, write_results
from finetune.saving import written
from finetune.settings import Settings, settings_from
from finetune.splits import subset
from finetune.study_targets import baseline
from finetune.targets import SCORES, TaskName, task_from
from finetune.targets_class import Classification
from finetune.tasks import Report, Task, load_task, settle
from finetune.train import Training


def multitask(
    source: str | Path | Encoder,
    tasks: Mapping[str, tuple[str | Path, str | Path | None] | Task],
    *,
    kinds: Mapping[str, str] | None = None,
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
        kinds: for names of tasks their kind, see `finetune.targets.TASKS`; the others are classifications.
        sampling: how often each task's samples come, see `sampling_shares`.
        output: folder for `results.json` and, below each task's name, a model of the shared encoder and its head
            (of the first seed).

    Returns:
        For each task the merit (of a classification the accuracy) of `joint` and of `alone`, and the paired `lead` of
        the former.

    Raises:
        UserError: data or settings that do not fit; nothing is left half-written.
    """
    options, started = settings_from(settings), time.perf_counter()
    _check(tasks, seeds, options)
    named = _kinds(tasks, kinds or {})
    with written(output, overwrite) as folder:
        encoder = source if isinstance(source, Encoder) else load_encoder(source, options.pooling)
        data = {n: t if isinstance(t, Task) else load_task(*t, encoder, named[n]) for n, t in tasks.items()}
        for task in data.values():
            settle(task.train, report)
            settle(task.test, report)
        accelerator, rates = accelerator_for(options), learning_rates(encoder.info)
        found: dict[str, dict[str, list[Judged]]] = {name: {"joint": [], "alone": []} for name in data}
        choices = []
        for seed in seeds:
            samples = {n: t.train.select(subset(t.train.labels, labels_per_class, seed)) for n, t in data.items()}
            shares = sampling_shares({name: len(each) for name, each in samples.items()}, sampling, temperature)
            joint = JointTraining(encoder, samples, shares, seed, options, accelerator)
            trained, heads, chosen = joint.fit(rates)
            choices.append({"seed": seed} | chosen)
            for name, task in data.items():
                about = {"strategy": "multitask", "seed": seed, "labels": len(samples[name]), "chosen": chosen}
                model = TaskModel(trained, heads[name], task.classes, about, target=task.target)
                start = partial(copy_of, encoder)
                single = Training(start, samples[name], task.target.outputs, seed, options, accelerator).fit(rates)
                alone = TaskModel(single[0], single[1], task.classes, target=task.target)
                for how, each in (("joint", model), ("alone", alone)):
                    said = judge_model(how, each, task.test, options)
                    found[name][how].append(said)
                    report(f"{name}, {how}, seed {seed}: {_told(task, said.merit)}")
                if folder is not None and seed == seeds[0]:
                    model.about["encoder"] = describe_encoder(encoder)
                    model.save(folder.hidden / name)
        results: dict[str, Any] = {"format": FORMAT, "sampling": sampling, "runs": choices}
        results["tasks"] = {name: _described(data[name]) | _compared(each) for name, each in found.items()}
        results |= {"encoder": describe_encoder(encoder), "settings": options.model_dump(mode="json")}
        results["seconds"] = round(time.perf_counter() - started, 3)
        if folder is not None:
            write_results(folder.hidden / "results.json", results)
    return results


def _told(task: Task, merit: float) -> str:
    """A merit for people."""
    if isinstance(task.target, Classification):
        return f"accuracy {100 * merit:.1f} %"
    return f"{SCORES[task.target.merit]} {merit:.3f}"


def _described(task: Task) -> dict[str, Any]:
    """The data, and what a constant would score."""
    if isinstance(task.target, Classification):
        return describe_task(task)
    return {**kind_of(task.target), **describe_data(task), "baseline": baseline(task)}


def _compared(found: dict[str, list[Judged]]) -> dict[str, Any]:
    joint, alone = found["joint"], found["alone"]
    kind = type(joint[0])
    return {"joint": kind.summary(joint), "alone": kind.summary(alone), "lead": kind.lead(joint, alone)}


def _kinds(tasks: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, TaskName]:
    """Of every task. Raises `UserError` for a kind that is not known, or of no task."""
    for name, kind in kinds.items():
        if name not in tasks:
            raise UserError(f"there is no task {name!r} to be of the kind {kind}; the tasks are {', '.join(tasks)}")
    return {name: task_from(kinds.get(name, "classification")) for name in tasks}


def _check(tasks: Mapping[str, Any], seeds: Sequence[int], settings: Settings) -> None:
    if not tasks or not seeds:
        raise UserError("multi-task training needs one task or more and one seed or more")
    for name in tasks:
        if not name or set(name) & set("/\\.") or name == "results":
            raise UserError(f"{name!r} names no task; use letters, digits, '-' and '_'")
    for name in ("patience", "drop_path", "ema"):
        if getattr(settings, name) is not None:
            raise UserError(f"{name} is for one task; leave it out of multi-task training")
