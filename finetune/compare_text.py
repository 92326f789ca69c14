"""Comparisons for people: merits by name, differences with their intervals, tables."""

from __future__ import annotations

from typing import Any

from finetune.targets import SCORES


def percent(interval: list[float]) -> str:
    """An interval of a share in words."""
    return f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def value(merit: str, number: float) -> str:
    """A merit's value: accuracy in per cent, others with their name."""
    return f"{100 * number:.1f} %" if merit == "accuracy" else f"{SCORES[merit]} {number:.3f}"


def named(merit: str, number: float) -> str:
    """The same with the name in any case."""
    return f"accuracy {value(merit, number)}" if merit == "accuracy" else value(merit, number)


def difference(merit: str, lead: dict[str, Any]) -> str:
    """A lead: of accuracy in points, of others in the merit's own unit."""
    if merit == "accuracy":
        return f"{100 * lead['difference']:+.1f} ({percent(lead['interval'])}) points, paired"
    low, high = lead["interval"]
    return f"{lead['difference']:+.3f} ({low:+.3f} to {high:+.3f}), paired"


def table(entries: list[dict[str, Any]], merit: str = "accuracy") -> str:
    """Aligned lines: the merit with its interval, other scores; `leads` below the one that has them."""
    width = max(len(entry["name"]) for entry in entries)
    rows = [_accuracies(entry) for entry in entries] if merit == "accuracy" else [_merits(e, merit) for e in entries]
    heads = list(rows[0])
    widths = [max(len(head), *(len(row[head]) for row in rows)) for head in heads]
    lines = ["  ".join([" " * width, *(f"{head:<{wide}}" for head, wide in zip(heads, widths, strict=True))])]
    for entry, row in zip(entries, rows, strict=True):
        cells = [f"{row[head]:<{wide}}" for head, wide in zip(heads, widths, strict=True)]
        lines.append("  ".join([f"{entry['name']:<{width}}", *cells]))
    for entry in entries:
        for each in entry.get("leads", []):
            lines.append(f"{entry['name']} over {each['over']}: {difference(merit, each)}")
    return "\n".join(line.rstrip() for line in lines)


def _accuracies(entry: dict[str, Any]) -> dict[str, str]:
    low, high = entry["interval"]
    return {
        "accuracy (95 % interval)": f"{100 * entry['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})",
        "log loss": f"{entry['log_loss']:.3f}",
        "calibration error": f"{entry['calibration_error']:.3f}",
    }


def _merits(entry: dict[str, Any], merit: str) -> dict[str, str]:
    low, high = entry["interval"]
    first = {f"{SCORES[merit]} (95 % interval)": f"{entry[merit]:.3f} ({low:.3f} to {high:.3f})"}
    others = [name for name in entry if name not in ("name", merit, "interval", "leads")]
    return first | {name.replace("_", " "): f"{entry[name]:.3f}" for name in others}
