"""Fine-tune, judge on the test set, save: what `headwater finetune` does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.errors import UserError
from finetune.encoder import Encoder, load_encoder
from finetune.evidence import Score, score
from finetune.features import accelerator_for, extract
from finetune.model import TaskModel, claim, publish
from finetune.results import FORMAT, describe_encoder, describe_task, seed_entry, summarize, write_results
from finetune.samples import Ints
from finetune.settings import Settings, Strategy, settings_from
from finetune.splits import subset
from finetune.strategies import FROZEN, fit_frozen, fit_trained, strategy_from
from finetune.study import study_targets
from finetune.targets import task_from
from finetune.tasks import Report, Task, load_task, settle
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
        strategy: `knn`, `linear`, `full` or `scratch`.
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
        study = _study if data.target.name == "classification" else study_targets
        results, first = study(encoder, data, chosen, labels_per_class, list(seeds), options, report, trace)
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


def _study(
    encoder: Encoder,
    task: Task,
    strategy: Strategy,
    budget: int | None,
    seeds: list[int],
    settings: Settings,
    report: Report,
    trace: Trace | None,
) -> tuple[dict[str, Any], TaskModel]:
    """Every seed's model fitted and judged; the results and the first seed's model."""
    subsets = [subset(task.train.labels, budget, seed) for seed in seeds]
    if task.held_out:
        report(f"no test set given: {len(task.test):,} of the labelled samples are held out as one")
    started = time.perf_counter()
    fit = _fitter(encoder, task, strategy, subsets, settings, report)
    preparation = time.perf_counter() - started
    scores: list[Score] = []
    entries: list[dict[str, Any]] = []
    first: TaskModel | None = None
    for seed, positions in zip(seeds, subsets, strict=True):
        started = time.perf_counter()
        model, probabilities = fit(seed, positions, trace if first is None else None)
        seconds = time.perf_counter() - started
        scores.append(score(probabilities, task.test.labels))
        entries.append(seed_entry(seed, len(positions), scores[-1], seconds, model.about["chosen"]))
        report(_line(f"{strategy}, {len(positions):,} labels, seed {seed}", scores[-1], f"{seconds:.1f} s"))
        if first is None:
            model.about |= {"strategy": strategy, "seed": seed, "labels": len(positions)}
            first = model
    assert first is not None
    head = {"format": FORMAT, "strategy": strategy, "labels_per_class": budget, "seeds": seeds}
    results = head | summarize(scores, entries) | describe_task(task)
    results |= {"preparation_seconds": round(preparation, 3), "encoder": describe_encoder(encoder)}
    precision = accelerator_for(settings).mixed_precision
    results["settings"] = settings.model_dump(mode="json") | {"precision": precision}
    first.about["encoder"] = results["encoder"]
    return results, first


_Fit = Callable[[int, Ints, Trace | None], tuple[TaskModel, np.ndarray]]


def _fitter(
    encoder: Encoder, task: Task, strategy: Strategy, subsets: list[Ints], settings: Settings, report: Report
) -> _Fit:
    """A function (seed, positions) -> model and its test probabilities; shares what seeds can share."""
    accelerator = accelerator_for(settings)
    needed = np.unique(np.concatenate(subsets))
    pool = task.train.select(needed)
    settle(pool, report)
    settle(task.test, report)
    labels = torch.from_numpy(pool.labels)
    if strategy in FROZEN:
        features = extract(encoder, pool, settings, accelerator)
        judged = extract(encoder, task.test, settings, accelerator)

    def fit(seed: int, positions: Ints, trace: Trace | None) -> tuple[TaskModel, np.ndarray]:
        rows = np.searchsorted(needed, positions)
        if strategy in FROZEN:
            known = torch.from_numpy(rows)
            model = fit_frozen(strategy, encoder, features[known], labels[known], task.classes, seed, settings)
            return model, model.from_features(judged).numpy()
        model = fit_trained(strategy, encoder, pool.select(rows), task.classes, seed, settings, accelerator, trace)
        return model, model.probabilities(task.test, settings).numpy()

    return fit


def _line(name: str, judged: Score, rest: str) -> str:
    low, high = (100 * bound for bound in judged.interval)
    return f"{name}: accuracy {100 * judged.accuracy:.1f} % ({low:.1f} to {high:.1f}), {rest}"
