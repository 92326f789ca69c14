"""Model soups: the average of fine-tuned models' weights (Wortsman et al. 2022, "Model soups")."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.errors import UserError
from finetune.blend import blend, check_alike, has_batch_norm, measure_batch_norm
from finetune.compare import beside
from finetune.labelled_data import LabelledData, ValidationData
from finetune.members import Member, Source, load_members
from finetune.model import TaskModel
from finetune.results import FORMAT, describe_encoder, kind_of
from finetune.saving import written
from finetune.settings import Settings, settings_from
from finetune.tasks import Report

Kind = Literal["greedy", "uniform"]
KINDS: tuple[Kind, ...] = ("greedy", "uniform")


@dataclass(frozen=True)
class Pot:
    """Averages models, and sets right what averaging disturbs."""

    settings: Settings
    statistics: LabelledData | None
    """Training data for BatchNorm, where the models have that."""

    def add(self, soup: TaskModel, model: TaskModel, share: float) -> TaskModel:
        """`soup` moved by `share` of the way to `model`."""
        mixed = blend(soup, model, share)
        if 0 < share < 1 and has_batch_norm(mixed.encoder) and not _equal(soup, model):
            assert self.statistics is not None
            measure_batch_norm(mixed.encoder, self.statistics.samples(mixed), self.settings)
        return mixed


def make_pot(members: list[Member], train: str | Path | None, settings: Settings, report: Report) -> Pot:
    """Raises `UserError` for models that cannot be averaged, or whose BatchNorm needs training data."""
    first = members[0]
    for other in members[1:]:
        check_alike(first.model, other.model, (first.name, other.name))
    if not has_batch_norm(first.model.encoder):
        return Pot(settings, None)
    if train is None:
        raise UserError(
            f"{first.name} has BatchNorm, whose statistics must be measured anew for averaged weights; "
            "give the training data with --train"
        )
    return Pot(settings, LabelledData(train, first.model, report))


def uniform_soup(members: Sequence[Member], pot: Pot) -> TaskModel:
    """The plain average of all: each counts alike."""
    soup = members[0].model
    for number, member in enumerate(members[1:], start=2):
        soup = pot.add(soup, member.model, 1 / number)
    return soup


def greedy_soup(members: Sequence[Member], merits: Sequence[float], validation: LabelledData, pot: Pot) -> Greedy:
    """Members in falling order of held-out merit, each kept if the soup's does not fall (algorithm 1)."""
    order = sorted(range(len(members)), key=lambda number: -merits[number])
    kept, soup, best = [order[0]], members[order[0]].model, merits[order[0]]
    for number in order[1:]:
        candidate = pot.add(soup, members[number].model, 1 / (len(kept) + 1))
        merit = validation.judge(Member("soup", candidate), pot.settings).merit
        if merit >= best:
            soup, best = candidate, merit
            kept.append(number)
    return Greedy(soup, [members[number].name for number in kept], best)


@dataclass(frozen=True)
class Greedy:
    """A greedy soup."""

    model: TaskModel
    kept: list[str]
    """Names of its members, best first."""
    merit: float
    """On the validation data, where it is at least that of the best member."""


def soup(
    sources: Sequence[Source],
    validation: str | Path,
    test: str | Path | None = None,
    *,
    kind: str = "greedy",
    train: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    report: Report = print,
    **settings: Any,
) -> dict[str, Any]:
    """Average models of one architecture and start; compare uniform, greedy, each member and their ensemble.

    Args:
        sources: folders that `headwater finetune` wrote.
        validation: labelled data that no member was trained on, to choose members on; or the training data of
            members that held a share of it out, which is then used.
        test: labelled data to judge on, which chooses nothing.
        kind: which soup to save: `greedy` or `uniform`.
        train: training data, needed where the encoder has BatchNorm.
        output: folder for the model and `results.json`.

    Raises:
        UserError: models that cannot be averaged, or data that does not fit; nothing is left half-written.
    """
    if kind not in KINDS:
        raise UserError(f"there is no soup {kind!r}; choose one of {', '.join(KINDS)}")
    options, started = settings_from(settings), time.perf_counter()
    with written(output, overwrite) as folder:
        members = load_members(sources)
        pot = make_pot(members, train, options, report)
        held_out = ValidationData(validation, members, report)
        data = LabelledData(test, members[0].model, report) if test is not None else None
        if data is not None:
            held_out.check_test(data)
        judged = held_out.judge_all(members, options)
        merits = [each.merit for each in judged]
        greedy, plain = greedy_soup(members, merits, held_out, pot), uniform_soup(members, pot)
        report(f"greedy soup: kept {len(greedy.kept)} of {len(members)}: {', '.join(greedy.kept)}")
        soups = [Member("greedy soup", greedy.model), Member("uniform soup", plain)]
        plainly = held_out.judge(soups[1], options)
        target = held_out.target
        results: dict[str, Any] = {"format": FORMAT, **kind_of(target), "soup": kind, "kept": greedy.kept}
        results["validation"] = {
            "samples": len(judged[0]),
            "fingerprint": held_out.fingerprint,
            "members": [each.entry() for each in judged],
            f"greedy_{target.merit}": greedy.merit,
            f"uniform_{target.merit}": plainly.merit,
        }
        if data is not None:
            best = members[int(np.argmax(merits))]
            results["test"] = _test(members, soups, best, data, options)
        chosen = soups[KINDS.index(kind)].model
        results["seconds"] = round(time.perf_counter() - started, 3)
        if folder is not None:
            facts = {
                "strategy": f"{kind} soup",
                "members": greedy.kept if kind == "greedy" else [m.name for m in members],
            }
            chosen.about = {"encoder": members[0].model.about.get("encoder"), "chosen": facts} | facts
            results["encoder"] = describe_encoder(chosen.encoder)
            folder.save(chosen, results)
    return results


def _test(
    members: list[Member],
    soups: list[Member],
    best: Member,
    data: LabelledData,
    settings: Settings,
) -> dict[str, Any]:
    """Everybody on the test set; the soups and the ensemble beside the member that was best on validation data."""
    shares = [1 / len(members)] * len(members)
    *judged, ensemble = data.judge_all(members, settings, shares)
    reference = judged[members.index(best)]
    ours = [*data.judge_all(soups, settings), ensemble]
    return {
        "samples": len(reference),
        "fingerprint": data.fingerprint,
        "best_on_validation": best.name,
        "models": [each.entry() for each in judged] + [beside(each, [reference]) for each in ours],
    }


def _equal(one: TaskModel, two: TaskModel) -> bool:
    states = one.encoder.state_dict(), two.encoder.state_dict()
    return all(bool((states[0][name] == states[1][name]).all()) for name in states[0])
