"""What the subcommands' parsers have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Command = Callable[[argparse.Namespace], int]


def add_command(sub: argparse._SubParsersAction, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    """A subcommand that calls `command`, described by `text`, which begins with a small letter."""
    parser: argparse.ArgumentParser = sub.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=command)
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_output(parser: argparse.ArgumentParser) -> None:
    """`--output` of a model, `--overwrite` and `--json`."""
    parser.add_argument("--output", type=Path, help="folder for the model and results.json")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    add_json(parser)
