"""Ensembles: the weighted mean of what several models predict."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data.errors import UserError
from finetune.alignment import fitted, mean_of
from finetune.compare import beside
from finetune.labelled_data import LabelledData, ValidationData
from finetune.members import Member, Source, check_fit, load_members
from finetune.mixture_weights import best_weights
from finetune.model import TaskModel, load_model
from finetune.results import FORMAT, kind_of
from finetune.saving import written
from finetune.settings import settings_from
from finetune.targets import Target
from finetune.tasks import Report

FILE = "ensemble.json"


@dataclass
class Ensemble:
    """Says the weighted mean of what its members say: probabilities, or quantities in their own units.

    Members may differ in encoder, size, tokenizer and strategy; their classes are matched by name, in the order of
    the first member.
    """

    members: list[Member]
    weights: list[float]
    """Of the members; they sum to 1."""
    about: dict[str, Any] = field(default_factory=dict)
    """Free facts kept in ensemble.json."""

    @classmethod
    def of(cls, model: TaskModel | Ensemble) -> Ensemble:
        """An ensemble, or one model as one."""
        return model if isinstance(model, Ensemble) else cls([Member("model", model)], [1.0])

    @property
    def kind(self) -> str:
        """What its members read: `images` or `text`."""
        return self.members[0].model.encoder.kind

    @property
    def target(self) -> Target:
        """What it says about a sample."""
        return self.members[0].model.target

    @property
    def classes(self) -> list[str]:
        """Names of the target's classes."""
        return self.target.classes

    def mean(self, each: Iterable[Tensor]) -> Tensor:
        """What it says of a batch, from its members' own distributions (each over its own classes), in order."""
        pairs = zip(self.members, each, strict=True)
        return mean_of(self.weights, (fitted(said, member.model, self.target) for member, said in pairs))

    def save(self, folder: Path) -> None:
        """Write `ensemble.json` and each member's model into `members/`."""
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for number, (member, weight) in enumerate(zip(self.members, self.weights, strict=True)):
            place = f"members/{number}"
            member.model.save(folder / place)
            entries.append({"name": member.name, "folder": place, "weight": weight})
        about = {"format": FORMAT, "task": self.target.name, "kind": self.kind, "classes": self.classes}
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
        weights = [float(m["weight"]) for m in about["members"]]
        check_fit(members)
    except FileNotFoundError:
        raise UserError(f"{path} is no ensemble: {FILE} is missing") from None
    except (json.JSONDecodeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"the ensemble in {path} is damaged ({error}); make it again") from None
    known = ("format", "task", "kind", "classes", "members")
    return Ensemble(members, weights, {name: about[name] for name in about if name not in known})


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
    """Average what models say, judge that beside each of them, and save it.

    Args:
        sources: folders that `headwater finetune` wrote: of any encoders and strategies, for one kind of task over the
            same classes.
        test: labelled data to judge on, which chooses nothing.
        validation: labelled data that no member was trained on; the weights are those that fit it best, see
            `finetune.mixture_weights`.
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
        first = members[0].model
        data = LabelledData(test, first, report) if test is not None else None
        results: dict[str, Any] = {"format": FORMAT, "task": first.target.name, **kind_of(first.target)}
        results["classes"] = first.classes
        shares = _given(weights, len(members))
        if validation is not None:
            held_out = ValidationData(validation, members, report)
            if data is not None:
                held_out.check_test(data)
            shares = best_weights(held_out, members, options)
            results["validation"] = {"samples": len(held_out.common), "fingerprint": held_out.fingerprint}
        made = Ensemble(members, shares)
        results["members"] = [{"name": m.name, "weight": w} for m, w in zip(members, shares, strict=True)]
        if data is not None:
            *each, ours = data.judge_all(members, options, shares)
            results["test"] = {
                "samples": len(ours),
                "fingerprint": data.fingerprint,
                "models": [*(one.entry() for one in each), beside(ours, each)],
            }
        results["seconds"] = round(time.perf_counter() - started, 3)
        if folder is not None:
            folder.save(made, results)
    return results


def _given(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise UserError(f"{len(weights)} weights do not fit {count} models; give one for each")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise UserError(f"the weights {list(weights)} are no proportions; none may be negative, one must be positive")
    return [float(weight) / sum(weights) for weight in weights]
