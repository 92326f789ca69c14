"""`headwater finetune`, `evaluate` and `predict`; every heavy import waits until its command runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from launch.output import tell, to_stderr

TASKS = ["classification", "multi-label", "regression", "tokens", "segmentation"]


def add(sub: argparse._SubParsersAction) -> None:
    """Put these commands into the command line."""
    _finetune(sub)
    _evaluate(sub)
    _predict(sub)


def _finetune(sub: argparse._SubParsersAction) -> None:
    parser = _command(sub, "finetune", finetune, "an exported encoder and labels -> a task model and its results")
    parser.add_argument("encoder", help="folder of an export, a timm or a transformers model; or a name of timm's")
    parser.add_argument("train", help="labelled shards, class folders, or a table of labelled pictures or text")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the strategy, e.g. epochs=10")
    parser.add_argument("--test", help="labelled data to judge on (default: 20 %% of TRAIN is held out)")
    parser.add_argument("--strategy", choices=["knn", "linear", "full", "scratch"], default="linear")
    parser.add_argument("--task", choices=TASKS, default="classification", help="kind of labels")
    parser.add_argument("--labels-per-class", type=int, metavar="N", help="label budget (default: all labels)")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions with other draws of labels (default: 1)")
    parser.add_argument("--output", type=Path, help="folder for results.json and the model")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    _json(parser)


def _evaluate(sub: argparse._SubParsersAction) -> None:
    parser = _command(sub, "evaluate", evaluate, "judge a saved task model on labelled data")
    parser.add_argument("model", type=Path, help="folder that finetune --output made")
    parser.add_argument("test", help="labelled data")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, e.g. inference_batch=64")
    parser.add_argument("--calibrate", metavar="DATA", help="labelled data to fit the model's temperature on, first")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for results.json, items.csv, diagrams")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    _json(parser)


def _predict(sub: argparse._SubParsersAction) -> None:
    parser = _command(sub, "predict", predict, "labels for new files from a saved task model")
    parser.add_argument("model", type=Path, help="folder that finetune --output made")
    parser.add_argument("inputs", nargs="+", metavar="input", help="files, folders, texts, or - for standard input")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write .csv or .jsonl instead of printing")


def finetune(arguments: argparse.Namespace) -> int:
    """`headwater finetune`."""
    from finetune.run import finetune

    results = finetune(
        arguments.encoder,
        arguments.train,
        arguments.test,
        task=arguments.task,
        strategy=arguments.strategy,
        labels_per_class=arguments.labels_per_class,
        seeds=range(arguments.seeds),
        output=arguments.output,
        overwrite=arguments.overwrite,
        report=to_stderr,
        **settings_of(arguments.settings),
    )
    low, high = results["interval"]
    merit = results.get("merit", "accuracy")
    text = f"{arguments.strategy}: {merit} {results[merit]:.4f} (95 % interval {low:.4f} to {high:.4f})"
    if merit != "accuracy":
        text += "\n" + "\n".join(_scores(results))
    if arguments.output:
        text += f"\nmodel and results.json in {arguments.output}\nnext: headwater predict {arguments.output} FILES"
    return tell(results, text, arguments)


def evaluate(arguments: argparse.Namespace) -> int:
    """`headwater evaluate`."""
    from finetune.evaluation import evaluate

    results = evaluate(
        arguments.model,
        arguments.test,
        calibrate=arguments.calibrate,
        output=arguments.output,
        overwrite=arguments.overwrite,
        report=to_stderr,
        **settings_of(arguments.settings),
    )
    if "merit" in results:
        return tell(results, "\n".join(_scores(results)), arguments)
    return tell(results, "\n".join([*_measures(results), *_classes(results["per_class"])]), arguments)


def _scores(results: dict[str, Any]) -> list[str]:
    """Lines of every score of a task that is no classification, beside what a constant would score."""
    lines = []
    for name, value in results["scores"].items():
        constant = f"   always the same: {results['baseline'][name]:.4f}" if "baseline" in results else ""
        lines.append(f"{name:<16} {value:.4f}{constant}")
    return lines


def _measures(results: dict[str, Any]) -> list[str]:
    heat = f", temperature {results['temperature']:.4g}" if results["temperature"] else ""
    lines = [f"{results['test']['samples']:,} test samples{heat}"]
    for name, (low, high) in results["intervals"].items():
        lines.append(f"{name.replace('_', ' '):<28} {results[name]:.4f}   {low:.4f} to {high:.4f}")
    return lines


def _classes(table: list[dict[str, Any]], most: int = 100) -> list[str]:
    widest = min(40, max(len(row["class"]) for row in table))
    lines = ["", f"{'class':<{widest}}   items  predicted  precision  recall     F1"]
    for row in table[:most]:
        shares = [f"{row[name]:.3f}" if row[name] is not None else "-" for name in ("precision", "recall", "f1")]
        name = " ".join(row["class"].split())[:widest]
        counts = f"{row['items']:>7,}  {row['predicted']:>9,}"
        lines.append(f"{name:<{widest}} {counts}  {shares[0]:>9}  {shares[1]:>6}  {shares[2]:>5}")
    return lines + ([f"… and {len(table) - most} more classes (--json or --output)"] if len(table) > most else [])


def predict(arguments: argparse.Namespace) -> int:
    """`headwater predict`: exit status 1 when some inputs could not be read."""
    from finetune.ensemble import load_any
    from finetune.predict import predict, write_rows

    found = predict(load_any(arguments.model), arguments.inputs)
    if arguments.output:
        write_rows(found, arguments.output)
        print(f"{len(found.rows):,} predictions in {arguments.output}")
    else:
        for row in found.rows:
            print(f"{row.input}\t{row.label}\t{row.probability:.4f}")
    if found.skipped:
        print(f"left out {len(found.skipped)} unreadable:", file=sys.stderr)
        for name, reason in found.skipped:
            print(f"  {name}: {reason}", file=sys.stderr)
    return 1 if found.skipped else 0


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """Values from `key=value` words; raises `UserError` for a word without `=`."""
    import yaml

    from data.errors import UserError

    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{pair!r} is no setting; write key=value, such as epochs=10")
        settings[key] = yaml.safe_load(value)
    return settings


def _command(sub: argparse._SubParsersAction, name: str, command: Any, text: str) -> argparse.ArgumentParser:
    parser = sub.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
