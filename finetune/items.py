"""What a model said of each labelled sample, as rows of a table, whatever the kind of task."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from data.files import write_atomically
from finetune.judge import Judgement
from finetune.targets import IGNORED
from finetune.targets_dense import Segmentation, Tags
from finetune.targets_vector import THRESHOLD, Regression


def write_items(judged: Judgement, names: list[str], path: Path) -> None:
    """A CSV file with a row for each sample, in order; `names` (n,) are what the samples are called.

    Several labels and tags are JSON lists, for any character may occur in them.
    """
    buffer = io.StringIO()
    rows = item_rows(judged, names)
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    write_atomically(path, buffer.getvalue())


def item_rows(judged: Judgement, names: list[str]) -> list[dict[str, Any]]:
    """One row a sample: `item`, its truth, what was predicted, and how right that is.

    several labels: `labels`, `predictions`, and `correct` where they are the same. Quantities: `X` and
    `X_prediction` of each. Words: `tags` and `predictions` of those that have a place in the row, how many are
    `right`, of how many `words`. Pixels: `right` of the known `pixels`, and the picture's own `miou`.
    """
    return [{"item": name} | row for name, row in zip(names, _judged_rows(judged), strict=True)]


def _judged_rows(judged: Judgement) -> list[dict[str, Any]]:
    match judged.target:
        case Regression():
            return _quantities(judged)
        case Tags():
            return _tags(judged)
        case Segmentation():
            return _pixels(judged)
    return _labels(judged)


def _labels(judged: Judgement) -> list[dict[str, Any]]:
    rows = []
    for decided, truth in zip(judged.decided, judged.truth, strict=True):
        said, true = (
            [name for name, value in zip(judged.target.classes, each.tolist(), strict=True) if value >= THRESHOLD]
            for each in (decided, truth)
        )
        rows.append({"labels": true, "predictions": said, "correct": int(said == true)})
    return rows


def _quantities(judged: Judgement) -> list[dict[str, Any]]:
    rows = []
    for decided, truth in zip(judged.decided, judged.truth, strict=True):
        row: dict[str, Any] = {}
        for name, true, said in zip(judged.target.classes, truth.tolist(), decided.tolist(), strict=True):
            row |= {name: true, f"{name}_prediction": said}
        rows.append(row)
    return rows


def _tags(judged: Judgement) -> list[dict[str, Any]]:
    rows = []
    for decided, truth in zip(judged.decided, judged.truth, strict=True):
        known = truth != IGNORED
        said, true = ([judged.target.classes[i] for i in each[known].tolist()] for each in (decided, truth))
        right = sum(a == b for a, b in zip(said, true, strict=True))
        rows.append({"tags": true, "predictions": said, "right": right, "words": len(true)})
    return rows


def _pixels(judged: Judgement) -> list[dict[str, Any]]:
    target = judged.target
    sums = target.sums(judged.decided, judged.truth)
    hits, _, present = (part.sum(axis=1).astype(int).tolist() for part in np.split(sums, 3, axis=1))
    merits = target.from_sums(sums).tolist()
    return [{"right": a, "pixels": b, target.merit: value} for a, b, value in zip(hits, present, merits, strict=True)]


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
