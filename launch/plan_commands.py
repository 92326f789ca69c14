"""`headwater plan`: arguments first, heavy imports when it runs."""

from __future__ import annotations

import argparse

from launch.output import tell
from launch.parsers import add_command, add_json


def add(sub: argparse._SubParsersAction) -> None:
    """Put the command into the command line."""
    text = "what a recipe needs on a cluster, and what it will run into first; needs neither GPU nor data"
    parser = add_command(sub, "plan", run_plan, text)
    parser.add_argument("recipe", help="recipe file, or the name of one of ours")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes to the recipe")
    parser.add_argument("--gpu", default="h200", help="a100, h100, h200 or b200; cpu for this machine (default: h200)")
    parser.add_argument(
        "--gpus", type=int, default=1, help="GPUs over all nodes; processes with --gpu cpu (default: 1)"
    )
    parser.add_argument("--nodes", type=int, help="nodes (default: one for every eight GPUs)")
    parser.add_argument("--link", default="ndr", help="between nodes: ndr, hdr, ethernet100, ethernet25 (default: ndr)")
    parser.add_argument("--cores", type=int, help="CPU cores of a node (default: 14 for each GPU)")
    text = "training samples (default: those of the data); a recipe in steps is planned for one pass over them"
    parser.add_argument("--samples", type=int, help=text)
    parser.add_argument("--days", type=float, help="time there is; says how many GPUs that takes")
    add_json(parser)


def run_plan(arguments: argparse.Namespace) -> int:
    """`headwater plan`: exit status 1 where it does not fit into memory or into the days."""
    from data.errors import UserError
    from launch.plan import Cluster, plan
    from launch.plan_text import describe
    from pretrain.recipe_file import load_recipe

    if arguments.days is not None and not arguments.days > 0:
        raise UserError(f"--days {arguments.days:g} is no time; give a number above 0")
    nodes = arguments.nodes or (1 if arguments.gpu == "cpu" else -(-arguments.gpus // 8))
    cluster = Cluster(arguments.gpu, arguments.gpus, nodes, arguments.link, arguments.cores)
    found = plan(load_recipe(arguments.recipe, arguments.settings), cluster, arguments.samples)
    tell(found.as_json(), describe(found, arguments.days), arguments)
    fits = sum(found.memory.values()) <= found.capacity
    return 0 if fits and (arguments.days is None or found.days <= arguments.days) else 1
