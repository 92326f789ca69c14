"""WiSE-FT: the models between a probe and its fine-tuned successor (Wortsman et al. 2022, "Robust fine-tuning of
zero-shot models")."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError
from finetune.compare import Judged, beside
from finetune.labelled_data import LabelledData, ValidationData
from finetune.members import Member, Source, load_members
from finetune.results import FORMAT, describe_encoder, kind_of
from finetune.saving import written
from finetune.settings import settings_from
from finetune.soup import Pot, make_pot
from finetune.targets import Target
from finetune.tasks import Report

STEPS = 11
"""Models on the way, ends included."""
BLIND = 0.5
"""Share where no validation data says better: close to the best on all of the paper's shifts (section 4)."""


def interpolate(
    probe: Source,
    tuned: Source,
    test: str | Path | None = None,
    *,
    shifted: Sequence[str | Path] = (),
    validation: str | Path | None = None,
    steps: int = STEPS,
    train: str | Path | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    report: Report = print,
    **settings: Any,
) -> dict[str, Any]:
    """Judge the weights `(1 - alpha) * probe + alpha * tuned` for alpha from 0 to 1; save the best on `validation`.

    Args:
        probe: a model on the encoder as it was before fine-tuning (`--strategy linear`).
        tuned: a model that was fine-tuned from that encoder; best by `--strategy lp-ft`, whose head too began as a
            probe's: between heads that began elsewhere the merit often falls.
        test: labelled data the merit on which is one axis of the robustness curve.
        shifted: labelled data of the same classes as they look elsewhere: the other axis, each a curve.
        validation: labelled data on which alpha is chosen; without it alpha is 0.5.
        train: training data, needed where the encoder has BatchNorm.

    Returns:
        For each alpha its merit everywhere (`curve`), the chosen one, and its leads over both ends.

    Raises:
        UserError: models that cannot be averaged, or data that does not fit; nothing is left half-written.
    """
    if steps < 2:
        raise UserError(f"a curve of {steps} model is none; give 2 or more, its ends included")
    options, started = settings_from(settings), time.perf_counter()
    with written(output, overwrite) as folder:
        members = load_members([probe, tuned])
        pot = make_pot(members, train, options, report)
        data = _open(members, test, shifted, validation, report)
        target = members[0].model.target
        points, judged = _curve(members, pot, data, [place / (steps - 1) for place in range(steps)], report)
        alpha = _choose(points, target)
        chosen = pot.add(members[0].model, members[1].model, alpha)
        named = Member(f"alpha {alpha:g}", chosen)
        results: dict[str, Any] = {"format": FORMAT, **kind_of(target), "alpha": alpha}
        results |= {"chosen_on_validation": validation is not None, "curve": points}
        results["data"] = {n: {"samples": len(judged[n, 0.0]), "fingerprint": d.fingerprint} for n, d in data.items()}
        results["ends"] = {"0": members[0].name, "1": members[1].name}
        results["leads"] = {
            name: beside(each.judge(named, options), [judged[name, 0.0], judged[name, 1.0]])
            for name, each in data.items()
            if name != "validation"
        }
        results["seconds"] = round(time.perf_counter() - started, 3)
        if folder is not None:
            facts = {"strategy": "interpolation", "members": [member.name for member in members], "alpha": alpha}
            chosen.about = {"encoder": members[0].model.about.get("encoder"), "chosen": facts} | facts
            results["encoder"] = describe_encoder(chosen.encoder)
            folder.save(chosen, results)
    return results


def _open(
    members: list[Member],
    test: str | Path | None,
    shifted: Sequence[str | Path],
    validation: str | Path | None,
    report: Report,
) -> dict[str, LabelledData]:
    """All data by name: `validation`, `test` and each shifted one; nothing chosen on what is judged."""
    first = members[0].model
    data: dict[str, LabelledData] = {}
    if test is not None:
        data["test"] = LabelledData(test, first, report)
    for source in shifted:
        name = f"shifted {Path(source).name}"
        data[name if name not in data else f"shifted {source}"] = LabelledData(source, first, report)
    if validation is not None:
        held_out = ValidationData(validation, members, report)
        for judged in data.values():
            held_out.check_test(judged)
        data["validation"] = held_out
    if not data:
        raise UserError("there is nothing to judge the models on; give --test, --shifted or --validation")
    return data


def _curve(
    members: list[Member], pot: Pot, data: dict[str, LabelledData], alphas: list[float], report: Report
) -> tuple[list[dict[str, Any]], dict[tuple[str, float], Judged]]:
    """The merit (and the loss on validation data) of every alpha, and what the two ends said."""
    points, ends = [], {}
    for alpha in alphas:
        called = members[int(alpha)].name if alpha in (0.0, 1.0) else f"alpha {alpha:g}"
        member = Member(called, pot.add(members[0].model, members[1].model, alpha))
        point: dict[str, Any] = {"alpha": alpha}
        for name, each in data.items():
            judged = each.judge(member, pot.settings)
            point[name] = judged.merit
            if name == "validation":
                point[f"validation_{each.target.misfit}"] = judged.loss
            if alpha in (0.0, 1.0):
                ends[name, alpha] = judged
        report(", ".join(f"{name} {value:.4g}" for name, value in point.items()))
        points.append(point)
    return points, ends


def _choose(points: list[dict[str, Any]], target: Target) -> float:
    """The alpha of highest merit on validation data, then of lowest loss there."""
    if "validation" not in points[0]:
        return BLIND
    best = max(points, key=lambda point: (point["validation"], -point[f"validation_{target.misfit}"]))
    return float(best["alpha"])
