"""`accelerate launch -m pretrain RECIPE key=value …`: train a recipe and export its encoder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from pretrain.ending import exit_status, main_process


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `headwater pretrain` shares."""
    parser.add_argument("recipe", help="a YAML file, or the name of one of ours")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings to change, e.g. train.steps=1000")
    parser.add_argument("--output", type=Path, help="the run's folder (default: runs/NAME)")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="where to start (default: auto)")
    parser.add_argument("--dry-run", action="store_true", help="check recipe and data, say what would run, and stop")


def run(arguments: argparse.Namespace) -> int:
    """Train in this process; returns the exit status: 0, 2 for bad input, 75 when told to stop, 1 for failures."""
    from pretrain.preemption import leave_when_asked

    leave_when_asked()
    from pretrain.accelerator import end_with_launcher

    end_with_launcher()
    return exit_status(lambda: _train(arguments))


def _train(arguments: argparse.Namespace) -> int:
    from pretrain.loop import train
    from pretrain.recipe_file import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.settings)
    output = arguments.output or Path("runs") / recipe.name
    if arguments.dry_run:
        from pretrain.dry_run import estimate

        print(json.dumps(estimate(recipe), indent=1))
        return 0
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    exported = train(recipe, output, "auto" if again else arguments.resume)
    if main_process():
        print(f"exported to {exported}")
        print(f"next: headwater finetune {exported} TRAIN_SHARDS --test TEST_SHARDS --strategy linear")
    return 0


def main() -> None:
    """Entry point of `python -m pretrain`."""
    parser = argparse.ArgumentParser(prog="pretrain", description="Train a recipe and export its encoder.")
    add_arguments(parser)
    sys.exit(run(parser.parse_intermixed_args()))


if __name__ == "__main__":
    main()
