"""`headwater advise`: the label-budget study; every heavy import waits until it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.output import tell, to_stderr
from launch.parsers import add_command, add_json


def add(sub: argparse._SubParsersAction) -> None:
    """Put the command into the command line."""
    text = "label-budget study: which strategy with how many labels, and is pre-training worth it"
    parser = add_command(sub, "advise", advise, text)
    parser.add_argument("encoder", help="an export's folder")
    parser.add_argument("train", help="labelled shards, or a table or folder of labelled text")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the strategies, e.g. epochs=10")
    parser.add_argument("--test", help="labelled data to judge on (default: 20 %% of TRAIN is held out)")
    parser.add_argument("--second", metavar="ENCODER", help="another export to compare with")
    parser.add_argument("--pretraining", metavar="SHARDS", help="what ENCODER was pre-trained on: how similar is it?")
    parser.add_argument("--budgets", metavar="N,N,…", help="labels in total, such as 10,100,1000,all")
    parser.add_argument("--per-class", action="store_true", help="budgets count the labels of each class")
    parser.add_argument("--strategies", metavar="A,B,…", help="such as majority,knn,linear,full,scratch")
    parser.add_argument("--test-items", type=int, metavar="N", help="judge on N of the test items (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="draws of labels (default: 3)")
    parser.add_argument("--minutes", type=float, default=20.0, help="time cap of this start (default: 20)")
    parser.add_argument("--targets", metavar="A,A,…", help="accuracies to tell the labels for, such as 0.6,0.8")
    parser.add_argument("--output", type=Path, default=Path("advise"), help="folder of the study (default: advise)")
    parser.add_argument("--overwrite", action="store_true", help="start afresh instead of going on")
    add_json(parser)


def advise(arguments: argparse.Namespace) -> int:
    """Run the study, or go on with it, and write its page and picture beside the results."""
    from finetune.advise.study import Choices, advise
    from launch.task_commands import settings_of

    choices = Choices(
        budgets=_words(arguments.budgets),
        per_class=arguments.per_class,
        strategies=_words(arguments.strategies),
        test_items=arguments.test_items,
        seeds=arguments.seeds,
        minutes=arguments.minutes,
        targets=_numbers(arguments.targets),
        pretraining=arguments.pretraining,
        settings=settings_of(arguments.settings),
    )
    results = advise(
        arguments.encoder,
        arguments.train,
        arguments.test,
        arguments.output,
        second=arguments.second,
        choices=choices,
        overwrite=arguments.overwrite,
        report=to_stderr,
    )
    draw(results, arguments.output)
    return tell(results, _text(results, arguments), arguments)


def draw(results: dict[str, Any], folder: Path) -> None:
    """Write `advise.html` and `advise.png`."""
    from data.files import write_atomically
    from launch.advise_page import page

    write_atomically(folder / "advise.html", page(results))
    if results["accuracy"]:
        from launch.advise_picture import picture

        picture(results, folder / "advise.png")


def _text(results: dict[str, Any], arguments: argparse.Namespace) -> str:
    lines = [results["recommendation"]["text"], f"read {arguments.output / 'advise.html'}"]
    if results["not_run"]:
        lines.append(f"{len(results['not_run'])} cells were not run; the same command again goes on with them")
    arm = next((arm for arm in results["arms"] if arm["name"] == results["recommendation"]["arm"]), None)
    if arm is not None:
        encoder = arguments.second if arm["weights"] == "second" else arguments.encoder
        test = f" --test {arguments.test}" if arguments.test else ""
        command = f"headwater finetune {encoder} {arguments.train}{test} --strategy {arm['strategy']}"
        lines.append(f"next: {' '.join([command, *arguments.settings])} --output MODEL")
    return "\n".join(lines)


def _words(text: str | None) -> list[str] | None:
    return [word for word in text.split(",") if word.strip()] if text else None


def _numbers(text: str | None) -> list[float] | None:
    from data.errors import UserError

    try:
        return [float(word) for word in _words(text) or []] or None
    except ValueError:
        raise UserError(f"--targets takes accuracies between 0 and 1, such as 0.6,0.8, not {text!r}") from None
