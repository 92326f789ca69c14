"""Judge a saved model on labelled data, and calibrate it on other data: what `headwater evaluate` does."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.errors import UserError
from data.files import write_atomically
from finetune.calibration import fit_temperature
from finetune.classified import Classified, class_table, confusion, intervals, measure
from finetune.ensemble import Ensemble, load_any
from finetune.evaluation_targets import evaluate_targets
from finetune.evidence import Score, score
from finetune.features import accelerator_for, extract
from finetune.labelled_data import LabelledData
from finetune.labelled_text import read_labelled_text
from finetune.model import TaskModel, claim, publish
from finetune.results import FORMAT, write_results
from finetune.samples import ImageSamples, Samples
from finetune.settings import Settings, settings_from
from finetune.tasks import Report, load_test


@dataclass(frozen=True)
class _Judged:
    """A test set, and what a model says about it."""

    samples: Samples
    fingerprint: str
    said: Classified
    score: Score


def evaluate(
    model: str | Path | TaskModel | Ensemble,
    test: str | Path,
    *,
    calibrate: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    report: Report = print,
    **settings: Any,
) -> dict[str, Any]:
    """Judge a saved model or ensemble on labelled data.

    Args:
        model: a folder that `finetune` or `ensemble` made, or one in memory.
        test: labelled data of the model's classes.
        calibrate: labelled data of their own on which a temperature is fitted first; it is saved with the
            model (where that is a folder) and holds from then on.
        output: a folder for `results.json`, `items.csv` and, of a classification, `confusion.png` and
            `reliability.png`.
        settings: see `finetune.settings.Settings`.

    Returns:
        What `results.json` holds: measures with 95 % intervals and, of a classification, the table of classes and
        the confusion matrix.

    Raises:
        UserError: unfit data, the same data to calibrate and to test, or an output that exists.
    """
    options, started = settings_from(settings), time.perf_counter()
    hidden = claim(Path(output), overwrite) if output is not None else None
    try:
        loaded = model if isinstance(model, TaskModel | Ensemble) else load_any(model)
        if loaded.target.name != "classification":
            if calibrate is not None:
                kind = loaded.target.name
                raise UserError(
                    f"--calibrate fits the temperature of a classification, and the model is for {kind}; leave it out"
                )
            results = evaluate_targets(loaded, test, options, report, hidden)
            if hidden is not None:
                publish(hidden, Path(output))  # type: ignore[arg-type]
            return results
        voices = Ensemble.of(loaded)
        data = LabelledData(test, voices.members[0].model, report)
        samples, calibration = data.common, None
        if calibrate is not None:
            if isinstance(loaded, Ensemble):
                raise UserError("an ensemble has no temperature of its own; calibrate its members, then combine them")
            calibration = _calibrate(loaded, calibrate, data.fingerprint, options)
            if isinstance(model, str | Path):
                save_temperature(Path(model).expanduser(), calibration)
            report(f"temperature {loaded.temperature:.4g}, fitted on {calibration['samples']:,} samples")
        probabilities = torch.stack(data.judgement(voices.members, voices.weights, options).decided).numpy()
        said = Classified.of(probabilities, samples.labels)
        judged = _Judged(samples, data.fingerprint, said, score(probabilities, samples.labels))
        results = _results(loaded, judged, calibration)
        results["seconds"] = round(time.perf_counter() - started, 3)
        if hidden is not None:
            _write(hidden, results, judged, loaded.classes, test)
            publish(hidden, Path(output))  # type: ignore[arg-type]
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)
    return results


def save_temperature(folder: Path, calibration: dict[str, Any]) -> None:
    """Put the temperature and how it was found into a model folder's `task.json`."""
    path = folder / "task.json"
    task = json.loads(path.read_text())
    task |= {"temperature": calibration["temperature"], "calibration": calibration}
    write_atomically(path, json.dumps(task, indent=1, ensure_ascii=False))


def _calibrate(model: TaskModel, source: str | Path, test: str, settings: Settings) -> dict[str, Any]:
    """Fit and set the model's temperature; what was done. Raises `UserError` for the test set itself."""
    samples, fingerprint = load_test(source, model.encoder, model.classes)
    if fingerprint == test:
        raise UserError(f"{source} is the test set; a temperature is fitted on other labelled data (--calibrate)")
    model.temperature = 1.0
    features = extract(model.encoder, samples, settings, accelerator_for(settings))
    logits = model.logits(features).numpy()
    before = measure(Classified.of(model.from_features(features).numpy(), samples.labels))
    model.temperature = fit_temperature(logits, samples.labels)
    after = measure(Classified.of(model.from_features(features).numpy(), samples.labels))
    names = ("expected_calibration_error", "log_loss")
    return {
        "temperature": model.temperature,
        "samples": len(samples),
        "fingerprint": fingerprint,
        "before": {name: before[name] for name in names},
        "after": {name: after[name] for name in names},
    }


def _results(model: TaskModel | Ensemble, judged: _Judged, calibration: dict[str, Any] | None) -> dict[str, Any]:
    matrix = confusion(judged.said, len(model.classes))
    found: dict[str, Any] = {
        "format": FORMAT,
        "interval": list(judged.score.interval),
        **measure(judged.said),
        "intervals": intervals(judged.said),
        "temperature": model.temperature if isinstance(model, TaskModel) else None,
        "test": {"samples": len(judged.samples), "fingerprint": judged.fingerprint},
        "classes": model.classes,
        "per_class": class_table(matrix, model.classes),
        "confusion": matrix.tolist(),
    }
    return found | ({"calibration": calibration} if calibration else {})


def _write(folder: Path, results: dict[str, Any], judged: _Judged, classes: list[str], test: str | Path) -> None:
    import numpy as np

    from finetune.diagrams import draw_confusion, draw_reliability

    write_results(folder / "results.json", results)
    draw_confusion(np.array(results["confusion"]), classes, folder / "confusion.png")
    draw_reliability(judged.said, results, folder / "reliability.png")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["item", "label", "prediction", "correct", "probability", "probability_of_label"])
    said = judged.said
    for row, name in enumerate(_names(judged.samples, test)):
        pair = classes[said.labels[row]], classes[said.predictions[row]]
        right = int(pair[0] == pair[1])
        writer.writerow([name, *pair, right, f"{said.confidence[row]:.6f}", f"{said.own[row]:.6f}"])
    write_atomically(folder / "items.csv", buffer.getvalue())


def _names(samples: Samples, test: str | Path) -> list[str]:
    """What each item is called: a picture's key, or the text itself."""
    if isinstance(samples, ImageSamples):
        return [samples.dataset.key(int(i)) for i in samples.ids]
    texts = read_labelled_text(test).texts
    return [texts[int(i)] for i in samples.ids]
