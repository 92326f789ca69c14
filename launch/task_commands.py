"""`headwater finetune`, `evaluate` and `predict`; every heavy import waits until its command runs."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.errors import UserError
from finetune.__main__ import add_arguments, scores
from finetune.__main__ import settings_of as settings_of
from launch.output import tell, to_stderr
from launch.parsers import add_command, add_json

if TYPE_CHECKING:
    from finetune.ensemble import Ensemble
    from finetune.model import TaskModel
    from finetune.prediction_output import Write


def add(sub: argparse._SubParsersAction) -> None:
    """Put these commands into the command line."""
    _finetune(sub)
    _evaluate(sub)
    _predict(sub)


def _finetune(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "finetune", finetune, "an exported encoder and labels -> a task model and its results")
    add_arguments(parser)
    parser.add_argument("--processes", type=int, metavar="N", help="processes (default: one for each GPU)")


def _evaluate(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "evaluate", evaluate, "judge a saved task model on labelled data")
    parser.add_argument("model", type=Path, help="folder that finetune, ensemble, soup … --output made")
    parser.add_argument("test", help="labelled data")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, e.g. inference_batch=64")
    parser.add_argument("--calibrate", metavar="DATA", help="labelled data to fit the model's temperature on, first")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for results.json, items.csv, diagrams")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    add_json(parser)


def _predict(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "predict", predict, "labels for new files from a saved task model")
    parser.add_argument("model", type=Path, help="folder that finetune, ensemble, soup … --output made")
    help = "pictures, folders, shards, patterns; texts, text files, tables; or - for standard input"
    parser.add_argument("inputs", nargs="+", metavar="input", help=help)
    help = "write .csv, .tsv or .jsonl instead of printing; of a segmentation, a folder for its masks"
    parser.add_argument("--output", type=Path, metavar="FILE", help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of masks if it exists")
    parser.add_argument("--format", choices=["csv", "tsv", "jsonl"], help="instead of the one that FILE's ending names")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="likeliest classes told of each input (1)")
    parser.add_argument("--column", metavar="NAME", help="column of tables that holds the text")


def finetune(arguments: argparse.Namespace) -> int:
    """`headwater finetune`: in this process, or through `accelerate launch` for several."""
    import os

    # Before torch is loaded: it tells at length of a store that has left before us.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from launch.processes import launch, processes_for

    count = processes_for(arguments.processes)
    if count == 1:
        from finetune.__main__ import run

        return run(arguments)
    output = arguments.output
    words = [arguments.encoder, arguments.train, *arguments.settings, "--strategy", arguments.strategy]
    words += ["--task", arguments.task, "--resume", arguments.resume]
    words += ["--seeds", str(arguments.seeds), "--seed", str(arguments.seed)]
    for name, value in (("test", arguments.test), ("labels-per-class", arguments.labels_per_class), ("output", output)):
        words += [] if value is None else [f"--{name}", str(value)]
    words += [f"--{name}" for name in ("overwrite", "json") if getattr(arguments, name)]
    run_folder = output.with_name(f"{output.name}.run") if output else None
    return launch(count, words, run_folder, module="finetune")


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
        return tell(results, "\n".join([f"{results['test']['samples']:,} test samples", *scores(results)]), arguments)
    return tell(results, "\n".join([*_measures(results), *_classes(results["per_class"])]), arguments)


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
    from finetune.predict import Skipped, stream

    rows, skipped = 0, 0
    model = load_any(arguments.model)
    with _written(model, arguments) as write:
        for row in stream(model, arguments.inputs, top=arguments.top, column=arguments.column):
            if isinstance(row, Skipped):
                skipped += 1
                to_stderr(f"unreadable: {row.input}: {row.reason}")
            else:
                rows += 1
                write(row)
    if arguments.output:
        print(f"{rows:,} predictions in {arguments.output}")
    if skipped:
        to_stderr(f"left out {skipped} unreadable")
    return 1 if skipped else 0


def _written(model: TaskModel | Ensemble, arguments: argparse.Namespace) -> AbstractContextManager[Write]:
    """What writes the rows: masks into a folder, tagged text as JSON where no format is named, all else as asked."""
    from finetune.mask_folder import written_masks
    from finetune.prediction_output import written_rows

    task = model.target.name
    if task != "segmentation":
        plain = task == "tokens" and arguments.output is None
        return written_rows(arguments.output, arguments.format or ("jsonl" if plain else None))
    if arguments.output is None or arguments.format is not None:
        raise UserError("a segmentation is written as masks; give a folder for them with --output, and no --format")
    return written_masks(arguments.output, model.classes, arguments.overwrite)
