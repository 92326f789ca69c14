"""Names of many files in one word: braces, and what is a URL."""

from __future__ import annotations

import re

from data.errors import UserError

_URL = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_MOST = 1_000_000


def is_url(name: str) -> bool:
    """Whether a source lies elsewhere (`s3://…`); paths and `file://` do not."""
    return bool(_URL.match(name))


def expand_braces(pattern: str) -> list[str]:
    """`shard-{000..119}.tar` and `{train,extra}/*.tar` as a shell expands them; zeros in front are kept.

    Braces without a comma or a range inside stay as they are. Raises `UserError` for a range that falls, or for
    more names than anyone can mean.
    """
    found = [""]
    for piece in _pieces(pattern):
        choices = _choices(piece)
        if len(found) * len(choices) > _MOST:
            raise UserError(f"{pattern} stands for more than {_MOST:,} names; check its braces")
        found = [front + choice for front in found for choice in choices]
    return found


def _pieces(pattern: str) -> list[str]:
    """The pattern cut into plain stretches and outermost `{…}` groups."""
    pieces, start, depth, opened = [], 0, 0, 0
    for place, letter in enumerate(pattern):
        if letter == "{":
            if depth == 0:
                opened = place
            depth += 1
        elif letter == "}" and depth:
            depth -= 1
            if depth == 0:
                pieces += [pattern[start:opened], pattern[opened : place + 1]]
                start = place + 1
    return [*pieces, pattern[start:]]


def _choices(piece: str) -> list[str]:
    if not (piece.startswith("{") and piece.endswith("}")):
        return [piece]
    inner = piece[1:-1]
    numbers = _RANGE.fullmatch(inner)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if not first <= last < first + _MOST:
            raise UserError(f"{piece} is no range of at most {_MOST:,} numbers; write it as {{000..119}}")
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        return [f"{number:0{width}d}" for number in range(first, last + 1)]
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(inner):
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append(inner[start:place])
            start = place + 1
    if not parts:
        return ["{" + rest + "}" for rest in expand_braces(inner)]
    return [choice for part in [*parts, inner[start:]] for choice in expand_braces(part)]
