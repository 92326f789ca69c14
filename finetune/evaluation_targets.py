"""Judge a saved model that is no classification of samples: its target's own scores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from finetune.ensemble import Ensemble
from finetune.items import write_items
from finetune.labelled_data import LabelledData
from finetune.model import TaskModel
from finetune.results import FORMAT, write_results
from finetune.samples import ImageSamples
from finetune.settings import Settings
from finetune.study_targets import summarize, told
from finetune.tasks import Report


def evaluate_targets(
    model: TaskModel | Ensemble, test: str | Path, settings: Settings, report: Report, folder: Path | None = None
) -> dict[str, Any]:
    """Judge a model or an ensemble on labelled data; with a `folder`, write `results.json` and `items.csv` there.

    Raises:
        UserError: unfit data, as `finetune.tasks.load_task`.
    """
    started = time.perf_counter()
    voices = Ensemble.of(model)
    data = LabelledData(test, voices.members[0].model, report)
    judged = data.judgement(voices.members, voices.weights, settings)
    samples = data.common
    report(f"evaluate: {told(judged)}, {len(samples):,} test samples")
    results = {
        "format": FORMAT,
        "task": model.target.name,
        **summarize([judged]),
        "seconds": round(time.perf_counter() - started, 3),
        "test": {"samples": len(samples), "fingerprint": data.fingerprint},
        "classes": model.classes,
    }
    if folder is not None:
        names = [samples.dataset.key(int(i)) for i in samples.ids] if isinstance(samples, ImageSamples) else data.names
        write_results(folder / "results.json", results)
        write_items(judged, names, folder / "items.csv")
    return results
