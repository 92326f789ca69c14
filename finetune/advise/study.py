"""The label-budget study: which way of using an encoder pays, with how many labels, and is pre-training worth it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from data.files import write_atomically
from finetune.advise.analysis import analyse
from finetune.advise.budgets import parse_budgets, settle_budgets, take
from finetune.advise.cells import Arm, CellFile, write_table
from finetune.advise.clock import Clock
from finetune.advise.duplicates import Separation, separate
from finetune.advise.progress import Plan, run_cells
from finetune.advise.runner import Runner, Subject
from finetune.advise.similarity import similarity
from finetune.encoder import Encoder, load_encoder
from finetune.features import settled
from finetune.results import describe_encoder, describe_task
from finetune.settings import STRATEGIES, Settings, settings_from
from finetune.strategies import FROZEN
from finetune.tasks import Report, Task, load_task, settle

DEFAULT = ("majority", "knn", "linear", "lp-ft", "lora", "full", "scratch")
"""Strategies of a study that names none, as far as this version has them."""
TRIAL_SHARE = 0.25
"""Of the steps, for each learning rate of every trained strategy, unless the settings say otherwise."""
RESERVE = 0.1
"""Share of the cap kept for intervals and files, at most `MOST_RESERVE` seconds."""
MOST_RESERVE = 20.0


@dataclass(frozen=True)
class Choices:
    """What a study may be told."""

    budgets: Sequence[str] | None = None
    """Numbers of labels in words, `all` among them; 10, 30, 100, … and all without."""
    per_class: bool = False
    """Whether budgets count the labels of each class."""
    strategies: Sequence[str] | None = None
    """`DEFAULT` without."""
    test_items: int | None = None
    """Judge on so many of the test items, stratified and the same in every cell; on all without."""
    seeds: int = 3
    """Draws of the labels and of everything else that is random."""
    minutes: float = 20.0
    """Time cap of each start; a study that is started again goes on."""
    targets: Sequence[float] | None = None
    """Accuracies for which the labels needed are told; round ones without."""
    pretraining: str | Path | None = None
    """Shards the encoder was pre-trained on, to tell how similar the task's data are."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the strategies; see `finetune.settings.Settings`."""


def advise(
    source: str | Path | Encoder,
    train: str | Path | Task,
    test: str | Path | None,
    output: str | Path,
    *,
    second: str | Path | None = None,
    choices: Choices | None = None,
    overwrite: bool = False,
    report: Report = print,
) -> dict[str, Any]:
    """Run the study, or go on with the one in `output`, and write `advise.json` and `cells.csv` there.

    Every strategy sees the same labels of a budget and seed (budgets are nested and stratified) and is judged on
    the same test items. Cells run cheap first until the cap; those that do not fit are named in the results.

    Args:
        source: an export's folder, or an encoder in memory.
        train, test: labelled data, see `finetune.tasks.load_task`; or a task already loaded.
        second: another encoder to compare with.

    Raises:
        UserError: anything the caller can put right.
    """
    choices, started = choices or Choices(), time.monotonic()
    settings, folder = settled(settings_from({"trial_share": TRIAL_SHARE} | choices.settings)), Path(output)
    _check(choices)
    clock = Clock(60 * choices.minutes - min(MOST_RESERVE, RESERVE * 60 * choices.minutes))
    names = _strategies(choices.strategies)
    subjects, separation = _subjects(source, train, test, second, settings, choices.test_items, report)
    subject = subjects["pre-trained"]
    labels = subject.task.train.labels
    asked = parse_budgets(choices.budgets) if choices.budgets else None
    budgets, notes = settle_budgets(labels, asked, choices.per_class)
    for note in notes:
        report(note)
    arms, seeds = _arms(names, second is not None), list(range(choices.seeds))
    identity = _identity(subjects, separation, choices, settings)
    file = CellFile(_folder(folder, overwrite) / "cells.jsonl", identity)
    subsets = {(n, seed): take(labels, budgets[n], seed, choices.per_class) for n in budgets for seed in seeds}
    for each in subjects.values():
        settle(each.task.train, report)
        settle(each.task.test, report)
    runner = Runner(subjects, settings, clock, folder / "features")
    plan = Plan(arms, list(budgets), seeds, subsets, settings, len(subject.task.test))
    alike = similarity(subject.encoder, subject.task, choices.pretraining, settings) if choices.pretraining else None
    missing = run_cells(plan, runner, file, report)
    if not missing:
        shutil.rmtree(folder / "features", ignore_errors=True)
    wanted = [file.cells[key] for key in plan.cells() if key in file.cells]
    results = {"format": 1} | describe_task(subject.task)
    results |= {
        "encoders": {name: describe_encoder(each.encoder) for name, each in subjects.items()},
        "duplicates": {
            "removed_from_train": separation.removed_from_train,
            "removed_from_test": separation.removed_from_test,
        },
        "budgets": list(budgets),
        "per_class": choices.per_class,
        "notes": notes,
        "seeds": seeds,
        "minutes": choices.minutes,
        "settings": settings.model_dump(mode="json"),
    }
    results |= analyse(wanted, arms, alike, choices.targets, len(subject.task.classes))
    results |= {"not_run": missing, "seconds": round(time.monotonic() - started, 1)}
    write_table(folder / "cells.csv", wanted)
    write_atomically(folder / "advise.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results


def _check(choices: Choices) -> None:
    if choices.test_items is not None and choices.test_items < 1:
        raise UserError("a study needs test items: --test-items 1000")
    if choices.seeds < 1 or not choices.minutes > 0:
        raise UserError("a study needs one seed or more and more than 0 minutes")
    if any(not 0 < target < 1 for target in choices.targets or ()):
        raise UserError("a target is an accuracy between 0 and 1: --targets 0.5 0.6")


def _strategies(asked: Sequence[str] | None) -> list[str]:
    known = ("majority", *STRATEGIES)
    for name in asked or ():
        if name not in known:
            raise UserError(f"there is no strategy {name!r}; choose among {', '.join(known)}")
    return [name for name in known if name in (asked or DEFAULT)]


def _arms(strategies: list[str], second: bool) -> list[Arm]:
    """Controls beside what they are controls of: untrained weights for frozen strategies."""
    arms = []
    for name in strategies:
        if name in ("majority", "scratch"):
            arms.append(Arm(name, "none"))
            continue
        arms += [Arm(name, "untrained")] * (name in FROZEN) + [Arm(name, "pre-trained")]
        arms += [Arm(name, "second")] * second
    return arms


def _subjects(
    source: str | Path | Encoder,
    train: str | Path | Task,
    test: str | Path | None,
    second: str | Path | None,
    settings: Settings,
    test_items: int | None,
    report: Report,
) -> tuple[dict[str, Subject], Separation]:
    """The encoders with the task as each reads it, and which samples were left out."""
    encoder = source if isinstance(source, Encoder) else load_encoder(source, settings.pooling)
    if not any(True for _ in encoder.parameters()):
        raise UserError("an encoder without weights has nothing to advise on")
    task = train if isinstance(train, Task) else load_task(train, test, encoder)
    separation = separate(task)
    if separation.removed_from_train:
        report(f"{separation.removed_from_train:,} training samples are in the test set too and are left out")
    if separation.removed_from_test:
        report(f"{separation.removed_from_test:,} test samples repeat another and are left out")
    if test_items is not None and test_items < len(separation.test):
        kept = take(task.test.labels[separation.test], test_items, 0, False)
        separation = replace(separation, test=separation.test[kept])
    subjects = {"pre-trained": Subject(encoder, separation.apply(task))}
    if second is not None:
        if isinstance(train, Task):
            raise UserError("a second encoder reads the data itself; give their paths, not a task in memory")
        other = load_encoder(second, settings.pooling)
        reread = load_task(train, test, other)
        subjects["second"] = Subject(other, separation.apply(reread))
    return subjects, separation


def _identity(
    subjects: dict[str, Subject], separation: Separation, choices: Choices, settings: Settings
) -> dict[str, Any]:
    """What must be the same for cells to be compared; seeds, budgets, strategies and the cap may grow."""
    task = subjects["pre-trained"].task
    weights = {name: describe_encoder(each.encoder)["fingerprint"] for name, each in subjects.items()}
    return {
        "encoder": weights["pre-trained"],
        "second encoder": weights.get("second"),
        "training data": [task.fingerprints["train"], int(separation.train.sum()), _digest(task.train.labels)],
        "test data": [task.fingerprints["test"], int(separation.test.sum()), _digest(task.test.labels)],
        "kind of budget": choices.per_class,
        "set of settings": json.loads(settings.model_dump_json()),
    }


def _digest(labels: np.ndarray) -> str:
    import hashlib

    return hashlib.sha256(labels.tobytes()).hexdigest()[:16]


def _folder(folder: Path, overwrite: bool) -> Path:
    """The study's folder, emptied where `overwrite`; a folder with other things in it is refused."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --output")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "cells.jsonl").exists():
        raise UserError(f"{folder} holds something that is no study; choose another --output")
    if overwrite and folder.is_dir():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; choose another --output") from None
    return folder
