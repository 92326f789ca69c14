"""`accelerate launch -m finetune ENCODER TRAIN key=value …`: fine-tune and judge, in one process or several."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from data.errors import UserError
from pretrain.ending import exit_status, main_process

STRATEGIES = ["knn", "linear", "frozen", "lora", "dora", "lp-ft", "gradual", "full", "scratch"]
TASKS = ["classification", "multi-label", "regression", "tokens", "segmentation"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `headwater finetune` shares."""
    parser.add_argument("encoder", help="folder of an export, a timm or a transformers model; or a name of timm's")
    parser.add_argument("train", help="labelled shards, class folders, or a table of labelled pictures or text")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the strategy, e.g. epochs=10")
    parser.add_argument("--test", help="labelled data to judge on (default: 20 %% of TRAIN is held out)")
    parser.add_argument("--strategy", choices=STRATEGIES, default="linear")
    parser.add_argument("--task", choices=TASKS, default="classification", help="kind of labels")
    parser.add_argument("--labels-per-class", type=int, metavar="N", help="label budget (default: all labels)")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions with other draws of labels (default: 1)")
    help = "the first of them; others draw other labels and orders, for members of a soup or an ensemble (default: 0)"
    parser.add_argument("--seed", type=int, default=0, help=help)
    parser.add_argument("--output", type=Path, help="folder for results.json and the model")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    parser.add_argument("--resume", choices=["auto", "never"], default="auto", help="whether to go on with OUTPUT.run")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Fine-tune in this process; returns the exit status: 0, 2 for bad input, 75 when told to stop."""
    from pretrain.preemption import SIGNALS, leave_when_asked

    leave_when_asked()
    from pretrain.accelerator import end_with_launcher

    end_with_launcher()
    before = {number: signal.signal(number, _leave) for number in SIGNALS}
    try:
        return exit_status(lambda: _finetune(arguments))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _finetune(arguments: argparse.Namespace) -> int:
    from finetune.run import finetune

    results = finetune(
        arguments.encoder,
        arguments.train,
        arguments.test,
        task=arguments.task,
        strategy=arguments.strategy,
        labels_per_class=arguments.labels_per_class,
        seeds=range(arguments.seed, arguments.seed + arguments.seeds),
        output=arguments.output,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
        report=lambda text: print(text, file=sys.stderr, flush=True),
        **settings_of(arguments.settings),
    )
    if main_process():
        print(json.dumps(results, indent=1, default=str) if arguments.json else _summary(results, arguments))
    return 0


def _summary(results: dict[str, Any], arguments: argparse.Namespace) -> str:
    low, high = results["interval"]
    merit = results.get("merit", "accuracy")
    text = f"{arguments.strategy}: {merit} {results[merit]:.4f} (95 % interval {low:.4f} to {high:.4f})"
    if merit != "accuracy":
        text += "\n" + "\n".join(scores(results))
    if arguments.output:
        text += f"\nmodel and results.json in {arguments.output}\nnext: headwater predict {arguments.output} FILES"
    return text


def scores(results: dict[str, Any]) -> list[str]:
    """Lines of every score of a task that is no classification, with its 95 % interval where it has one, beside what a
    constant would score."""
    lines = []
    for name, value in results["scores"].items():
        low, high = results["intervals"].get(name, (None, None))
        sure = "" if low is None else f"   {low:.4f} to {high:.4f}"
        constant = f"   always the same: {results['baseline'][name]:.4f}" if "baseline" in results else ""
        lines.append(f"{name:<16} {value:.4f}{sure:<22}{constant}".rstrip())
    return lines


def settings_of(pairs: list[str]) -> dict[str, Any]:
    """Values from `key=value` words; raises `UserError` for a word without `=`."""
    import yaml

    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{pair!r} is no setting; write key=value, such as epochs=10")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError:  # such as a regular expression that begins with a bracket or an asterisk
            settings[key] = value
    return settings


def _leave(number: int, frame: FrameType | None) -> None:
    """Between the runs that save at a signal: leave at once, and clean up on the way."""
    from pretrain.preemption import Preempted

    raise Preempted(signal.Signals(number).name, agreed=False)


def main() -> None:
    """Entry point of `python -m finetune`."""
    parser = argparse.ArgumentParser(prog="finetune", description="Fine-tune an encoder on labelled data.")
    add_arguments(parser)
    sys.exit(run(parser.parse_intermixed_args()))


if __name__ == "__main__":
    main()
