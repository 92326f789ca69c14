"""Ensembles: the weighted mean of what several models predict."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from finetune.compare import Judged, beside
from finetune.members import LabelledData, Member, Source, ValidationData, load_members
from finetune.model import TaskModel, load_model
from finetune.results import FORMAT
from finetune.saving import written
from finetune.settings import Settings, settings_from
from finetune.tasks import Report

FILE = "ensemble.json"
_ROUNDS = 1000
_TINY = 1e-12
Floats = NDArray[np.float64]


@dataclass
class Ensemble:
    """Predicts one of `classes` by the weighted mean of its members' probabilities.

    Members may differ in encoder, size, tokenizer and strategy; their classes are matched by name.
    """

    members: list[Member]
    weights: list[float]
    """Of the members; they sum to 1."""
    classes: list[str]
    about: dict[str, Any] = field(default_factory=dict)
    """Free facts kept in ensemble.json."""

    @property
    def kind(self) -> str:
        """What its members read: `images` or `text`."""
        return self.members[0].model.encoder.kind

    def mix(self, probabilities: Sequence[NDArray[np.float32]], classes: Sequence[list[str]]) -> NDArray[np.float32]:
        """The weighted mean of members' probabilities (n, classes), each over its own list of classes."""
        total = np.zeros((len(probabilities[0]), len(self.classes)))
        for weight, each, names in zip(self.weights, probabilities, classes, strict=True):
            total += weight * each[:, [names.index(name) for name in self.classes]].astype(np.float64)
        return total.astype(np.float32)

    def judge(self, data: LabelledData, settings: Settings, name: str = "ensemble") -> tuple[Judged, list[Judged]]:
        """The ensemble and each member on labelled items over the same classes."""
        each = [data.judge(member, settings) for member in self.members]
        probabilities = self.mix([judged.probabilities for judged in each], [data.classes] * len(each))
        return Judged(name, probabilities, each[0].labels), each

    def save(self, folder: Path) -> None:
        """Write `ensemble.json` and each member's model into `members/`."""
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for number, (member, weight) in enumerate(zip(self.members, self.weights, strict=True)):
            place = f"members/{number}"
            member.model.save(folder / place)
            entries.append({"name": member.name, "folder": place, "weight": weight})
        about = {"format": FORMAT, "task": "classification", "kind": self.kind, "classes": self.classes}
        text = json.dumps(about | {"members": entries} | self.about, indent=1, ensure_ascii=False)
        (folder / FILE).write_text(text)


def load_ensemble(folder: str | Path) -> Ensemble:
    """An ensemble from the folder that `headwater ensemble` wrote; raises `UserError` when it is not one."""
    path = Path(folder).expanduser()
    try:
        about = json.loads((path / FILE).read_text())
        if about["format"] != FORMAT:
            raise UserError(f"{path} is an ensemble of format {about['format']}; this version reads {FORMAT}")
        members = [Member(m["name"], load_model(path / m["folder"]), path / m["folder"]) for m in about["members"]]
        weights, classes = [float(m["weight"]) for m in about["members"]], list(about["classes"])
    except FileNotFoundError:
        raise UserError(f"{path} is no ensemble: {FILE} is missing") from None
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"the ensemble in {path} is damaged ({error}); make it again") from None
    known = ("format", "task", "kind", "classes", "members")
    return Ensemble(members, weights, classes, {name: about[name] for name in about if name not in known})


def load_any(folder: str | Path) -> TaskModel | Ensemble:
    """Whatever a folder holds: one model or an ensemble; raises `UserError` when it is neither."""
    return load_ensemble(folder) if (Path(folder).expanduser() / FILE).is_file() else load_model(folder)


def ensemble(
    sources: Sequence[Source],
    test: str | Path | None = None,
    *,
    validation: str | Path | None = None,
    weights: Sequence[float] | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    report: Report = print,
    **settings: Any,
) -> dict[str, Any]:
    """Average models' probabilities, judge that beside each of them, and save it.

    Args:
        sources: folders that `headwater finetune` wrote: of any encoders and strategies, over the same classes.
        test: labelled data to judge on, which chooses nothing.
        validation: labelled data that no member was trained on; the weights are those of highest likelihood there.
        weights: given ones instead; without either, all are equal.
        output: folder for the ensemble and `results.json`.

    Raises:
        UserError: models that do not fit together, bad weights or data; nothing is left half-written.
    """
    options, started = settings_from(settings), time.perf_counter()
    if validation is not None and weights is not None:
        raise UserError("weights are either given or chosen on validation data, not both")
    if test is None and output is None:
        raise UserError("there is nothing to do with the ensemble; give --test to judge it, --output to save it")
    with written(output, overwrite) as folder:
        members = load_members(sources)
        classes = members[0].model.classes
        data = LabelledData(test, classes, report) if test is not None else None
        results: dict[str, Any] = {"format": FORMAT, "task": "classification", "classes": classes}
        shares = _given(weights, len(members))
        if validation is not None:
            held_out = ValidationData(validation, members, report)
            if data is not None:
                held_out.check_test(data)
            judged = [held_out.judge(member, options) for member in members]
            shares = likeliest_weights([each.probabilities for each in judged], judged[0].labels)
            results["validation"] = {"samples": len(judged[0].labels), "fingerprint": held_out.fingerprint}
        made = Ensemble(members, shares, classes)
        results["members"] = [{"name": m.name, "weight": w} for m, w in zip(members, shares, strict=True)]
        if data is not None:
            ours, each_of = made.judge(data, options)
            results["test"] = {
                "samples": len(ours.labels),
                "fingerprint": data.fingerprint,
                "models": [*(each.entry() for each in each_of), beside(ours, each_of)],
            }
        results["seconds"] = round(time.perf_counter() - started, 3)
        if folder is not None:
            folder.save(made, results)
    return results


def likeliest_weights(probabilities: Sequence[NDArray[np.float32]], labels: NDArray[np.int64]) -> list[float]:
    """The mixture weights under which the true classes are likeliest: the global optimum, by EM.

    The log likelihood is concave in the weights; expectation-maximisation (Dempster et al. 1977) keeps them
    positive and summing to 1 and never makes it smaller.
    """
    rows = np.arange(len(labels))
    true: Floats = np.stack([np.maximum(p[rows, labels].astype(np.float64), _TINY) for p in probabilities], axis=1)
    weights = np.full(true.shape[1], 1 / true.shape[1])
    for _ in range(_ROUNDS):
        shares = true * weights
        new = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
        done = np.abs(new - weights).max() < 1e-7
        weights = new
        if done:
            break
    return [float(weight) for weight in weights / weights.sum()]


def _given(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise UserError(f"{len(weights)} weights do not fit {count} models; give one for each")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise UserError(f"the weights {list(weights)} are no proportions; none may be negative, one must be positive")
    return [float(weight) / sum(weights) for weight in weights]
