"""Rules of thumb that tutorials give, beside what this study measured."""

from __future__ import annotations

from typing import Any

from finetune.advise.cells import Arm
from finetune.advise.table import Table
from finetune.strategies import FROZEN

NOT_MEASURED = "Not measured here"
Rule = dict[str, str]


def check_rules(table: Table, gains: list[dict[str, Any]], alike: dict[str, Any] | None) -> list[Rule]:
    """For each rule the finding in words; nothing is said about what was not measured."""
    return [
        {"rule": "Fine-tuning takes some 1,000 to 10,000 labelled examples.", "finding": _enough(table)},
        {
            "rule": "With few labels keep the encoder frozen; with many, train all of it.",
            "finding": _frozen_or_trained(table),
        },
        {"rule": "The fewer the labels, the more pre-training is worth.", "finding": _fewer(gains)},
        {
            "rule": "Pre-training data that are like the task's help; others call for training more layers.",
            "finding": _alike(alike),
        },
    ]


def _enough(table: Table) -> str:
    arms = [arm for arm in table.arms if arm.pretrained]
    reach = [(n, arm) for arm in arms for n in table.measured(arm.name)]
    if len({n for n, _ in reach}) < 2:
        return f"{NOT_MEASURED}: it takes two budgets or more."
    best = {n: max((table.accuracy[a.name, n].value, a.name) for m, a in reach if m == n) for n, _ in reach}
    most = max(best)
    near = min(n for n in best if best[n][0] >= best[most][0] - 0.05)
    text = f"{best[most][1]} gives {100 * best[most][0]:.1f} % with all {most:,} labels measured; "
    if near == most:
        before = max(n for n in best if n != most)
        return text + f"with {before:,} the best is still {100 * (best[most][0] - best[before][0]):.1f} points below."
    return text + f"{near:,} are enough to come within 5 points ({best[near][1]}, {100 * best[near][0]:.1f} %)."


def _frozen_or_trained(table: Table) -> str:
    frozen = [arm for arm in table.arms if arm.pretrained and arm.strategy in FROZEN]
    trained = [arm for arm in table.arms if arm.pretrained and arm.strategy not in FROZEN]
    said = []
    for labels in table.budgets:
        one, two = _best(table, trained, labels), _best(table, frozen, labels)
        found = table.difference(one, two, labels) if one and two else None
        if found is None or one is None or two is None:
            continue
        low, high = found.interval
        who = f"{one.name} and {two.name} do not differ measurably"
        if found.seeds == 1:
            who = f"{one.name} and {two.name} had one seed, which is no verdict"
        elif low > 0 or high < 0:
            who = f"{one.name} beats {two.name}" if low > 0 else f"{two.name} beats {one.name}"
        bounds = f"{100 * found.value:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
        said.append((labels, f"with {labels:,} labels {who}, {bounds}"))
    if not said:
        return f"{NOT_MEASURED}: no frozen and trained strategy ran on the same labels."
    kept = said if len(said) < 4 else [said[0], said[len(said) // 2], said[-1]]
    text = "; ".join(text for _, text in kept)
    return f"{text[0].upper()}{text[1:]}."


def _best(table: Table, arms: list[Arm], labels: int) -> Arm | None:
    here = [arm for arm in arms if (arm.name, labels) in table.accuracy]
    return max(here, key=lambda arm: table.accuracy[arm.name, labels].value, default=None)


def _fewer(gains: list[dict[str, Any]]) -> str:
    if len(gains) < 2:
        return f"{NOT_MEASURED}: it takes controls at two budgets or more."
    said = []
    for row in (gains[0], gains[-1]):
        bounds = f"{100 * row['difference']:+.1f} points ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        said.append(f"{bounds} with {row['labels']:,} labels")
    apart = gains[0]["low"] > gains[-1]["high"] or gains[-1]["low"] > gains[0]["high"]
    more = "less" if gains[-1]["difference"] > gains[0]["difference"] else "more"
    verdict = f"worth {more} with fewer labels" if apart else "the intervals overlap, so neither way is shown"
    return f"{' and '.join(said)}: {verdict}."


def _alike(alike: dict[str, Any] | None) -> str:
    if alike is None:
        return f"{NOT_MEASURED}: name the pre-training shards with --pretraining."
    low, high = alike["interval"]
    return (
        f"Distance {alike['distance']:.2f} ({low:.2f} to {high:.2f}) on a scale from 0 to 2: {alike['words']}. "
        "Whether likeness helps takes several pre-training sets to tell; compare two encoders with --second."
    )
