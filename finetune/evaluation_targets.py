"""Judge a saved model that is no classification of samples: its target's own scores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from finetune.features import accelerator_for
from finetune.items import write_items
from finetune.judge import judge
from finetune.model import TaskModel
from finetune.reading import read
from finetune.results import FORMAT, write_results
from finetune.samples import ImageSamples
from finetune.settings import Settings
from finetune.study_targets import summarize, told
from finetune.tasks import Report


def evaluate_targets(
    model: TaskModel, test: str | Path, settings: Settings, report: Report, folder: Path | None = None
) -> dict[str, Any]:
    """Judge a model on labelled data; with a `folder`, write `results.json` and `items.csv` there.

    Raises:
        UserError: unfit data, as `finetune.tasks.load_task`.
    """
    started = time.perf_counter()
    found = read(test, model.encoder, model.target.name, model.target)
    samples = found.samples
    judged = judge(model.encoder, model.head, samples, settings, accelerator_for(settings))
    report(f"evaluate: {told(judged)}, {len(samples):,} test samples")
    results = {
        "format": FORMAT,
        "task": model.target.name,
        **summarize([judged]),
        "seconds": round(time.perf_counter() - started, 3),
        "test": {"samples": len(samples), "fingerprint": found.fingerprint},
        "classes": model.classes,
    }
    if folder is not None:
        names = found.names
        if isinstance(samples, ImageSamples):
            names = [samples.dataset.key(int(i)) for i in samples.ids]
        write_results(folder / "results.json", results)
        write_items(judged, names, folder / "items.csv")
    return results
