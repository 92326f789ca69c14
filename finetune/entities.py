"""Entities in BIO tags: `B-X` begins one of kind X, `I-X` goes on, `O` is none (Ramshaw and Marcus 1995)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Span = tuple[str, int, int]
"""Kind, first word, and the word after the last."""


def is_bio(tags: Iterable[str]) -> bool:
    """Whether every tag is `O`, `B-…` or `I-…`, and one begins an entity."""
    known = set(tags)
    return all(tag == "O" or tag[:2] in ("B-", "I-") for tag in known) and any(tag[:2] == "B-" for tag in known)


def spans(tags: Sequence[str]) -> set[Span]:
    """The entities of one text, as CoNLL's conlleval reads them: an `I-X` that follows no X begins one."""
    found: set[Span] = set()
    kind, start = "", 0
    for place, tag in enumerate([*tags, "O"]):
        mark, now = tag[:2], tag[2:] if tag != "O" else ""
        if kind and (mark != "I-" or now != kind):
            found.add((kind, start, place))
            kind = ""
        if now and not kind:
            kind, start = now, place
    return found
