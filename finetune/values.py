"""Labels as people write them -> the numbers that a target compares with."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import UserError
from finetune.targets import Target
from finetune.targets_class import Classification
from finetune.targets_vector import MultiLabel, Regression

Ints = NDArray[np.int64]
Where = Callable[[int], str]
"""Names the place of the i-th sample for a message, such as `train.csv, line 7`."""
_BETWEEN = re.compile(r"[|;]")


class Encoded(NamedTuple):
    """What samples carry beside their inputs."""

    target: Target
    labels: Ints
    """(n,) class numbers; zeros where the task is no classification."""
    values: Tensor | None
    """float32 (n, outputs) truth; None for a classification, whose truth is its labels."""


def encode_classes(labels: Ints, names: list[str], known: Target | None, source: object) -> Encoded:
    """Class numbers over `names` as numbers over the `known` target's classes, matched by name.

    Raises:
        UserError: a class that the known ones lack; without known ones, a class without samples, or a single one.
    """
    if known is None:
        _require_all_classes(labels, names, source)
        return Encoded(Classification(names), labels, None)
    if names != known.classes:
        places = np.array([known.classes.index(n) if n in known.classes else -1 for n in names], dtype=np.int64)
        matched = places[labels]
        _refuse_unseen({names[label] for label in labels[matched < 0]}, known, source)
        labels = matched
    return Encoded(known, labels, None)


def encode_label_sets(raw: Sequence[Any], where: Where, known: Target | None, source: object) -> Encoded:
    """Lists of labels, or strings with `|` or `;` between them; an empty one has none of the labels."""
    sets = [_label_set(value, where(i)) for i, value in enumerate(raw)]
    names = known.classes if known else sorted_names(set().union(*sets))
    if not names:
        raise UserError(f"{source} names no label at all; is the label in another column?")
    if known is not None:
        _refuse_unseen(set().union(*sets) - set(names), known, source)
    places = {name: place for place, name in enumerate(names)}
    values = torch.zeros(len(sets), len(names))
    for i, each in enumerate(sets):
        values[i, [places[name] for name in each]] = 1.0
    return Encoded(known or MultiLabel(names), _zeros(len(sets)), values)


def encode_quantities(raw: Sequence[Any], where: Where, known: Target | None, source: object) -> Encoded:
    """Numbers, or (JSONL) lists of numbers or objects of named numbers, the same names everywhere.

    Raises `UserError` for what is no finite number, and where nothing varies.
    """
    rows = [_quantities(value, where(i)) for i, value in enumerate(raw)]
    names = known.classes if known else list(rows[0])
    for i, row in enumerate(rows):
        if list(row) != names:
            raise UserError(f"{where(i)} has {_shown(list(row))}, where {_shown(names)} should be")
    values = torch.tensor([list(row.values()) for row in rows], dtype=torch.float64)
    if known is None:
        deviation = values.std(dim=0, correction=0)
        for name, spread in zip(names, deviation.tolist(), strict=True):
            if spread <= 1e-12 * float(values.abs().max()):
                raise UserError(f"{source} has the same {name} everywhere; there is nothing to learn")
        known = Regression(names, values.mean(dim=0).tolist(), deviation.tolist())
    return Encoded(known, _zeros(len(rows)), values.float())


def sorted_names(names: set[str]) -> list[str]:
    """In numeric order where all are whole numbers, else alphabetically."""
    if all(name.lstrip("-").isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _label_set(value: Any, place: str) -> set[str]:
    if isinstance(value, str):
        value = _BETWEEN.split(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    if not isinstance(value, list) or any(isinstance(each, list | dict) or each is None for each in value):
        raise UserError(f"{place} has no list of labels; write them with | between them, or as a list in JSONL")
    return {name for name in (str(each).strip() for each in value) if name}


def _quantities(value: Any, place: str) -> dict[str, float]:
    if isinstance(value, list):
        named = {f"value {number}": each for number, each in enumerate(value)}
    else:
        named = value if isinstance(value, dict) else {"value": value}
    found = {}
    for name, each in named.items():
        try:
            number = float("nan") if isinstance(each, bool) else float(each)
        except (TypeError, ValueError):
            number = float("nan")
        if not math.isfinite(number):
            raise UserError(f"{place} has {str(each)!r} where a finite number should be; correct or remove it")
        found[str(name)] = number
    if not found:
        raise UserError(f"{place} has no number")
    return found


def _require_all_classes(labels: Ints, classes: list[str], source: object) -> None:
    if len(classes) < 2:
        raise UserError(f"{source} has the one class {classes[0]!r}; a classification task needs two or more")
    empty = [classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
    if empty:
        raise UserError(f"{source} names {_shown(empty)} but has no sample of it; add samples or remove the class")


def _refuse_unseen(unseen: set[str], known: Target, source: object) -> None:
    if unseen:
        raise UserError(
            f"{source} has {_shown(sorted(unseen))}, which the training data lacks "
            f"(its classes: {_shown(known.classes)}); add training samples or remove these test samples"
        )


def _shown(names: list[str]) -> str:
    listed = ", ".join(repr(name) for name in names[:5])
    return f"{'class' if len(names) == 1 else 'classes'} {listed}" + (f" and {len(names) - 5} more" * (len(names) > 5))


def _zeros(count: int) -> Ints:
    return np.zeros(count, dtype=np.int64)
