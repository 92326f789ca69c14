"""What a command prints: results on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def tell(result: dict[str, Any], text: str, arguments: argparse.Namespace) -> int:
    """Print `text`, or the result as JSON where --json was given; returns the exit status 0."""
    print(json.dumps(result, indent=1, default=str) if arguments.json else text)
    return 0


def to_stderr(text: str) -> None:
    """Print a line of progress."""
    print(text, file=sys.stderr, flush=True)
