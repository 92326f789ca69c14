"""`advise.html`: the study on one self-contained page, from the JSON that `finetune.advise` makes."""

from __future__ import annotations

import html
from typing import Any

from launch.advise_charts import curves_of, legend, svg

_STYLE = """
:root{color-scheme:light dark;--text:#1f2328;--soft:#59636e;--back:#fff;--card:#f6f8fa;--grid:#d1d9e0;--good:#1a7f37;
--bad:#cf222e}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9198a1;--back:#0d1117;--card:#161b22;--grid:#30363d;
--good:#3fb950;--bad:#f85149}}
*{box-sizing:border-box}body{margin:0 auto;max-width:860px;padding:20px 16px;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:32px 0 6px}
p{margin:6px 0}.soft,figcaption{color:var(--soft);font-size:.9rem}.advice{background:var(--card);border-radius:8px;
padding:12px 14px;margin:14px 0;font-size:1.08rem}figure{margin:0;background:var(--card);border-radius:8px;padding:10px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:12px}.grid{stroke:var(--grid)}
.curve{fill:none;stroke-width:2;stroke-linejoin:round}.band{opacity:.13;stroke:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.85rem;margin-top:6px}.legend i{display:inline-block;
width:26px;margin-right:6px;vertical-align:middle}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;
font-variant-numeric:tabular-nums}th,td{padding:3px 14px 3px 0;text-align:left;vertical-align:top;white-space:nowrap}
th{color:var(--soft);font-weight:500}.good{color:var(--good)}.bad{color:var(--bad)}dt{font-weight:600;margin-top:10px}
dd{margin:0}
"""


def page(results: dict[str, Any]) -> str:
    """The page; it asks nothing of any network."""
    sections = [_head(results)]
    if results["accuracy"]:
        curves = curves_of(results)
        sections += [
            f"<h2>Accuracy against labels</h2><figure>{svg('Accuracy against labels', curves)}{legend(curves)}</figure>"
            '<p class="soft">Bands: 95 %, over seeds and test items. Dashed: without pre-training.</p>',
            _benefit(results),
            _multipliers(results),
            _targets(results),
            _laws(results),
        ]
    sections += [
        _similarity(results["similarity"]),
        _rules(results),
        _seconds(results),
        _how(results),
        _missing(results),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Label-budget study</title><style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _head(results: dict[str, Any]) -> str:
    train, test = results["train"]["samples"], results["test"]["samples"]
    about = f"{train:,} training labels, {test:,} test items, {len(results['classes'])} classes"
    text = html.escape(results["recommendation"]["text"])
    return f'<h1>Which strategy, with how many labels?</h1><p class="soft">{about}</p><div class="advice">{text}</div>'


def _benefit(results: dict[str, Any]) -> str:
    rows = []
    for row in results["benefit"]:
        word = ("good", "helps") if row["helps"] else ("bad", "harms") if row["harms"] else ("soft", "not measurable")
        difference = f"{_points(row['difference'])} ({_points(row['low'])} to {_points(row['high'])})"
        mark = f'<span class="{word[0]}">{word[1]}</span>'
        rows.append([f"{row['labels']:,}", mark, difference, html.escape(f"{row['arm']} against {row['against']}")])
    text = (
        "No control was run beside a pre-trained encoder."
        if not rows
        else (
            "Best with pre-training minus best without, in points of accuracy, paired by seed and test item. "
            "The intervals allow for all strategies and budgets looked at (White's reality check), "
            "so they are wider than those of one pair."
        )
    )
    table = _table(["labels", "pre-training", "points", "compared"], rows) if rows else ""
    return f'<h2>Is pre-training worth it?</h2>{table}<p class="soft">{html.escape(text)}</p>'


def _multipliers(results: dict[str, Any]) -> str:
    budgets = sorted({row["labels"] for row in results["multipliers"]})
    if not budgets:
        return ""
    arms = list(dict.fromkeys(row["arm"] for row in results["multipliers"]))
    cells = {(row["arm"], row["labels"]): _worth(row) for row in results["multipliers"]}
    rows = [[html.escape(arm), *(cells.get((arm, n), "") for n in budgets)] for arm in arms]
    example = next((row for row in results["multipliers"] if row["multiplier"]), None)
    told = ""
    if example is not None:
        told = (
            f"{example['arm']} with {example['labels']:,} labels does as well as training from scratch with "
            f"{_round(example['multiplier'] * example['labels'])}. "
        )
    note = f"{told}≤ and &gt;: beyond the labels that training from scratch was measured with."
    return (
        "<h2>What a label is worth</h2>"
        f"{_table(['labels', *(f'{n:,}' for n in budgets)], rows)}"
        f'<p class="soft">How many labels from scratch equal these with pre-training. {note}</p>'
    )


def _worth(row: dict[str, Any]) -> str:
    """Labels from scratch, with the interval."""
    n = row["labels"]
    ends = (row["least"] * n, row["most"] * n)
    value, low, high = (_labels(x if x is None else x * n, *ends) for x in (row["multiplier"], row["low"], row["high"]))
    return value if value == low == high else f"{value} <span class='soft'>({low} to {high})</span>"


def _labels(value: float | None, least: float, most: float) -> str:
    if value is None:
        return f"&gt;{most:,.0f}"
    return f"≤{least:,.0f}" if value <= least * 1.0001 else _round(value)


def _round(value: float) -> str:
    """Two significant digits."""
    return f"{float(f'{value:.2g}'):,.0f}"


def _targets(results: dict[str, Any]) -> str:
    levels = sorted({row["target"] for row in results["targets"]})
    if not levels:
        return ""
    cells = {}
    for row in results["targets"]:
        value, low, high = (_labels(row[key], row["least"], row["most"]) for key in ("labels", "low", "high"))
        text = value if value == low == high else f"{value} <span class='soft'>({low} to {high})</span>"
        cells[row["arm"], row["target"]] = text
    arms = list(dict.fromkeys(row["arm"] for row in results["targets"]))
    rows = [[html.escape(arm), *(cells.get((arm, level), "") for level in levels)] for arm in arms]
    return f"<h2>Labels needed</h2>{_table(['for', *(f'{100 * level:g} %' for level in levels)], rows)}"


def _laws(results: dict[str, Any]) -> str:
    rows = []
    for law in results["power_laws"]:
        if law["reason"]:
            rows.append(
                [html.escape(law["arm"]), f"<span class='soft'>not estimable: {html.escape(law['reason'])}</span>"]
            )
            continue
        told = "; ".join(
            f"{_round(each['labels'])} labels: {100 * (1 - each['error']):.1f} % "
            f"({100 * (1 - each['high']):.1f} to {100 * (1 - each['low']):.1f})"
            for each in law["foretold"]
        )
        rows.append([html.escape(law["arm"]), f"{told}; exponent {law['exponent'][0]:.2f}"])
    note = (
        "Accuracy foretold by error = a · labels^(−b) + c, fitted to the budgets measured (Hestness et al. 2017). "
        "The interval holds if the law goes on as it was."
    )
    return f'<h2>With more labels than measured</h2>{_table(["", ""], rows, wrap=True)}<p class="soft">{note}</p>'


def _similarity(alike: dict[str, Any] | None) -> str:
    head = "<h2>Are the task's data like those of pre-training?</h2>"
    if alike is None:
        return f'{head}<p class="soft">Not measured: name the pre-training shards with --pretraining.</p>'
    low, high = alike["interval"]
    return (
        f"{head}<p>{html.escape(alike['words']).capitalize()}: distance {alike['distance']:.2f} "
        f"({low:.2f} to {high:.2f}) between 0 (alike) and 2.</p>"
        f'<p class="soft">A linear classifier on the encoder\'s features tells the two apart in '
        f"{100 * alike['told_apart']:.1f} % of held-out cases ({alike['samples']:,} samples of each). "
        f"{html.escape(alike['source'])}.</p>"
    )


def _rules(results: dict[str, Any]) -> str:
    items = "".join(
        f"<dt>“{html.escape(rule['rule'])}”</dt><dd>{html.escape(rule['finding'])}</dd>"
        for rule in results.get("rules", [])
    )
    return f"<h2>Rules of thumb, checked</h2><dl>{items}</dl>" if items else ""


def _seconds(results: dict[str, Any]) -> str:
    budgets = sorted({row["labels"] for row in results["accuracy"]})
    if not budgets:
        return ""
    cells = {(row["arm"], row["labels"]): f"{row['seconds']:,.1f}" for row in results["accuracy"]}
    arms = list(dict.fromkeys(row["arm"] for row in results["accuracy"]))
    rows = [[html.escape(arm), *(cells.get((arm, n), "") for n in budgets)] for arm in arms]
    note = "Median of the seeds: choosing settings, fitting, features and judging the test set, each cell as if alone."
    return f"<h2>Seconds</h2>{_table(['', *(f'{n:,}' for n in budgets)], rows)}<p class='soft'>{note}</p>"


def _how(results: dict[str, Any]) -> str:
    counts = {about["learning_rates"] for about in results.get("trials", {}).values()}
    tuned = "No learning rates were tried."
    if len(counts) == 1:
        tuned = (
            f"Every strategy that trains, scratch included, chose among {counts.pop()} learning rates "
            "on an inner split of its labels."
        )
    elif counts:
        each = ", ".join(f"{arm} {about['learning_rates']}" for arm, about in results["trials"].items())
        tuned = f"Learning rates were chosen on an inner split, among unequally many: {each}."
    if counts and (share := results["settings"].get("trial_share", 1.0)) < 1:
        tuned += f" Each was tried over {100 * share:g} % of the steps."
    removed = results["duplicates"]
    sentences = [
        f"{len(results['seeds'])} seeds. Budgets are nested and stratified; all strategies saw the same labels.",
        tuned,
        "A batch held no more samples than there were labels.",
        "knn chose k and linear its penalty by cross-validation on the same labels.",
        "Untrained encoders were drawn anew with each seed.",
        f"{removed['removed_from_train']:,} training samples that are in the test set, and "
        f"{removed['removed_from_test']:,} repeated test samples, were left out.",
        *(f"{note[0].upper()}{note[1:]}." for note in results["notes"]),
    ]
    return f"<h2>How it was measured</h2><p>{html.escape(' '.join(sentences))}</p>"


def _missing(results: dict[str, Any]) -> str:
    if not results["not_run"]:
        return ""
    rows = [
        [html.escape(m["arm"]), f"{m['labels']:,}", str(m["seed"]), html.escape(m["reason"])]
        for m in results["not_run"]
    ]
    note = f"{len(rows)} cells; start the same command again to go on with them."
    table = _table(["arm", "labels", "seed", "why"], rows, wrap=True)
    return f'<h2>Not run</h2><p class="soft">{note}</p><details><summary>which</summary>{table}</details>'


def _table(head: list[str], rows: list[list[str]], wrap: bool = False) -> str:
    """A table that scrolls by itself where it is wider than the page; cells are HTML."""
    names = "".join(f"<th>{name}</th>" for name in head)
    style = ' style="white-space:normal"' if wrap else ""
    lines = ("".join(f"<td{style}>{cell}</td>" for cell in row) for row in rows)
    return f'<div class="wide"><table><tr>{names}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"
