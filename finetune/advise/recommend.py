"""One recommendation in words."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from finetune.advise.cells import Arm
from finetune.advise.table import Table

MARGIN = 0.01
"""Accuracy that a cheaper way may cost."""


def recommend(table: Table, gains: list[dict[str, Any]], chance: float) -> dict[str, Any]:
    """What to use with the labels at hand (the largest budget that was run), and with fewer.

    At each budget it is the cheapest arm shown to be within `MARGIN` of the best: the upper end of the paired
    95 % interval of its shortfall is no more. Controls can be recommended too. `chance` is the accuracy of guessing.
    """
    by_budget = [choice for labels in table.budgets if (choice := _choose(table, labels)) is not None]
    if not by_budget:
        return {"arm": None, "benefit": None, "text": "No strategy was run; raise --minutes.", "by_budget": []}
    last = by_budget[-1]
    gain = next((row for row in gains if row["labels"] == last["labels"]), None)
    benefit = any(row["helps"] for row in gains) if gains else None
    sentences = [_advice(last), _benefit(gains, gain)]
    common = table.accuracy.get(("majority", last["labels"]))
    if last["interval"][0] <= max(chance, common.value if common is not None else 0.0):
        sentences.insert(1, "That is not shown to be better than guessing or always naming the commonest class.")
    changes = [c for c, after in pairwise(by_budget) if c["arm"] != after["arm"]]
    if changes:
        sentences.append("With fewer: " + "; ".join(f"up to {c['labels']:,}, {c['arm']}" for c in changes) + ".")
    if last["seeds"] == 1:
        sentences.append("One seed was run: the intervals leave out the chance of the draw.")
    facts = {"arm": last["arm"], "labels": last["labels"], "benefit": benefit, "text": " ".join(sentences)}
    return facts | {"by_budget": by_budget}


def _choose(table: Table, labels: int) -> dict[str, Any] | None:
    here = [a for a in table.arms if (a.name, labels) in table.accuracy and a.weights != "untrained"]
    here = [arm for arm in here if arm.strategy != "majority"]
    if not here:
        return None
    best = max(here, key=lambda arm: table.accuracy[arm.name, labels].value)
    cheap_first = sorted(here, key=lambda arm: table.seconds(arm.name, labels))
    shortfalls = {arm.name: _shortfall(table, best, arm, labels) for arm in cheap_first}
    chosen = next(arm for arm in cheap_first if shortfalls[arm.name][2] <= MARGIN)
    cheaper = cheap_first[: cheap_first.index(chosen)]
    open_still = [arm.name for arm in cheaper if shortfalls[arm.name][1] <= MARGIN]
    found, short = table.accuracy[chosen.name, labels], shortfalls[chosen.name]
    return {
        "labels": labels,
        "arm": chosen.name,
        "accuracy": found.value,
        "interval": list(found.interval),
        "seconds": table.seconds(chosen.name, labels),
        "best": best.name,
        "shortfall": short[0],
        "shortfall_interval": list(short[1:]),
        "perhaps_as_good": open_still,
        "seeds": found.seeds,
    }


def _shortfall(table: Table, best: Arm, arm: Arm, labels: int) -> tuple[float, float, float]:
    """By how much `arm` falls short of `best`: value, low, high."""
    if arm is best:
        return 0.0, 0.0, 0.0
    found = table.difference(best, arm, labels)
    return (found.value, *found.interval) if found is not None else (1.0, 1.0, 1.0)


def _advice(choice: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in choice["interval"])
    text = (
        f"With {choice['labels']:,} labels use {choice['arm']}: {100 * choice['accuracy']:.1f} % "
        f"({low:.1f} to {high:.1f})"
    )
    if choice["arm"] == choice["best"]:
        text += ", the best measured"
    else:
        text += f", the cheapest shown to be within a point of the best ({choice['best']})"
    if choice["perhaps_as_good"]:
        text += (
            f"; {', '.join(choice['perhaps_as_good'])}, cheaper, may be as good: more seeds or test items would tell"
        )
    return text + "."


def _benefit(gains: list[dict[str, Any]], last: dict[str, Any] | None) -> str:
    if not gains:
        return "Whether pre-training helped was not measured: no control was run beside it."
    helped = [row for row in gains if row["helps"]]
    if not helped:
        harmed = [row for row in gains if row["harms"]]
        if harmed:
            return f"Pre-training did harm: {_points(harmed[-1])} with {harmed[-1]['labels']:,} labels."
        return f"No measurable benefit of pre-training at any budget ({_points(gains[-1])} at the largest)."
    if last is not None and last["helps"]:
        return f"Pre-training is worth {_points(last)} there, against {last['against']}."
    text = f"Pre-training is worth {_points(helped[-1])} with {helped[-1]['labels']:,} labels"
    if last is None:
        return text + "."
    return f"{text}; with {last['labels']:,} no benefit was measurable ({_points(last)})."


def _points(row: dict[str, Any]) -> str:
    return f"{100 * row['difference']:+.1f} points ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
