"""What each subcommand does; every heavy import waits until its command runs."""

from __future__ import annotations

import argparse
import json
import math

from launch.output import tell


def quickstart(arguments: argparse.Namespace) -> int:
    """`headwater quickstart`."""
    from launch.quickstart import run

    run(arguments.kind, arguments.output, arguments.seeds)
    return 0


def pretrain(arguments: argparse.Namespace) -> int:
    """`headwater pretrain`: in this process, or through `accelerate launch` for several."""
    import os

    # Before torch is loaded: it tells at length of a store that has left before us.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from launch.network import nodes_for
    from launch.processes import launch, processes_for

    count = 1 if arguments.dry_run else processes_for(arguments.processes)
    nodes = nodes_for(arguments.nodes, arguments.main_address, arguments.main_port)
    if arguments.dry_run or (count == 1 and nodes is None and not arguments.max_restarts):
        from pretrain.__main__ import run

        return run(arguments)
    from pathlib import Path

    from pretrain.recipe_file import load_recipe

    # Read here as well: one process says what is wrong with a recipe, before others are started.
    output = arguments.output or Path("runs") / load_recipe(arguments.recipe, arguments.settings).name
    words = [arguments.recipe, *arguments.settings, "--resume", arguments.resume, "--output", str(output)]
    return launch(count, words, output, arguments.max_restarts, nodes)


def replay(arguments: argparse.Namespace) -> int:
    """`headwater replay`: exit status 1 where something is not finite."""
    from dataclasses import asdict

    from pretrain.replay import describe, replay

    found = replay(arguments.run, arguments.step, arguments.settings, arguments.start)
    tell(asdict(found), describe(found), arguments)
    return 0 if math.isfinite(found.loss) and math.isfinite(found.gradient_norm) else 1


def status(arguments: argparse.Namespace) -> int:
    """`headwater status`: exit status 1 when a run has failed or fallen silent."""
    from launch.status import as_json, find_runs, read_status, table

    found = [read_status(run) for run in find_runs(arguments.runs)]
    print(json.dumps(as_json(found), indent=1) if arguments.json else table(found))
    return int(any(each.state in ("failed", "silent", "hung") for each in found))


def report(arguments: argparse.Namespace) -> int:
    """`headwater report`."""
    from launch.report import write_report

    print(write_report(arguments.run, pictures=not arguments.no_pictures, output=arguments.output))
    return 0
