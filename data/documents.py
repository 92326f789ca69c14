"""Files and folders of text -> documents, one string at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import UserError

DocumentUnit = Literal["file", "line", "paragraph"]
JSON_LINES = (".jsonl", ".ndjson")
_NAMES = (
    "txt text md markdown rst tex org adoc html xml csv tsv json yaml yml toml ini cfg py pyi c h cc cpp "
    "hpp cu rs go java kt scala js jsx ts tsx css rb php pl lua r jl hs ml swift cs sh sql srt vtt log"
)
TEXT_SUFFIXES = frozenset("." + name for name in _NAMES.split())
"""What counts as text inside a folder; a file named outright is read whatever its suffix."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_BLANK_LINES = re.compile(r"\r?\n(?:[ \t]*\r?\n)+")


@dataclass
class ReadCounts:
    """What reading came across; filled in while the documents are consumed."""

    bytes_read: int = 0
    """Bytes of the files finished so far."""
    replaced: int = 0
    """Undecodable pieces that became U+FFFD."""
    empty: int = 0
    """Documents without any text, left out."""


def find_text(sources: Sequence[str | Path]) -> list[Path]:
    """The files behind `sources`: files as named, folders walked recursively in sorted order.

    Hidden files and folders are passed over. Raises `UserError` for a source that does not exist, a folder
    without text files, or no sources at all.
    """
    if not sources:
        raise UserError("no text was named; give files (.txt, .jsonl, …) or folders that hold them")
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = _walk(source)
            if not inside:
                raise UserError(f"the folder {source} holds no text files (.txt, .md, .py, .jsonl, …)")
            found += inside
        elif source.is_file():
            found.append(source)
        else:
            raise UserError(f"{source} does not exist; give text files or folders that hold them")
    return found


def read_documents(
    sources: Sequence[str | Path],
    document: DocumentUnit = "file",
    field: str = "text",
    counts: ReadCounts | None = None,
    advance: Callable[[int], object] | None = None,
) -> Iterator[str]:
    """Each document of `sources` in turn; one file, or one line of a JSONL file, is in memory at a time.

    A text file is one document, or one a `line`, or one a `paragraph` (split at blank lines). A line of a
    JSONL file is always one document: the string under `field`. Bytes that are not UTF-8 become U+FFFD and
    are counted, documents of white space alone are left out and counted; `advance` hears the bytes of each
    piece of input read. Raises `UserError` for missing or empty sources, broken JSON or a missing field.
    """
    counts = counts if counts is not None else ReadCounts()
    found = False
    for path in find_text(sources):
        for text, size in _pieces(path, document, field, counts):
            counts.bytes_read += size
            if advance is not None:
                advance(size)
            if text.strip():
                found = True
                yield text
            elif text or size:
                counts.empty += 1
    if not found:
        raise UserError(f"{', '.join(map(str, sources))}: no text in there; every file or line is empty")


def _walk(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            if not name.startswith(".") and (suffix in TEXT_SUFFIXES or suffix in JSON_LINES):
                found.append(Path(parent, name))
    return found


def _pieces(path: Path, document: DocumentUnit, field: str, counts: ReadCounts) -> Iterator[tuple[str, int]]:
    """(text, bytes of input it took) pairs of one file."""
    try:
        if path.suffix.lower() in JSON_LINES:
            yield from _json_lines(path, field, counts)
        elif document == "line":
            with open(path, "rb") as file:
                for raw in file:
                    yield _decode(raw.rstrip(b"\r\n"), counts), len(raw)
        else:
            raw = path.read_bytes()
            text = _decode(raw, counts)
            parts = _BLANK_LINES.split(text.strip("\r\n")) if document == "paragraph" else [text]
            for part in parts[:-1]:
                yield part, 0
            yield parts[-1], len(raw)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _json_lines(path: Path, field: str, counts: ReadCounts) -> Iterator[tuple[str, int]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(_decode(raw, counts))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not JSON ({error.msg}); one object a line is needed"
                ) from error
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                fields = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                raise UserError(f"{path}, line {number}: no string under {field!r} (found: {fields}); name its field")
            # JSON may spell half a surrogate pair, which no UTF-8 text can hold.
            text, lone = _SURROGATES.subn("\ufffd", row[field])
            counts.replaced += lone
            yield text, len(raw)


def _decode(raw: bytes, counts: ReadCounts) -> str:
    text = raw.decode("utf-8-sig", errors="replace")
    if "\ufffd" in text:
        counts.replaced += text.count("\ufffd") - raw.count("\ufffd".encode())
    return text
