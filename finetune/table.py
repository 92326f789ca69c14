"""Rows of CSV, TSV and JSONL files: what is labelled, and its label as it is written."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import UserError

SUFFIXES = (".tsv", ".csv", ".jsonl")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "value", "score")
_LONGEST_FIELD = 2**31 - 1
"""Bytes in a field of a CSV file; the library's own limit would stop at 128 KiB."""


class Row(NamedTuple):
    """One labelled input."""

    number: int
    """Its line, from 1."""
    input: str
    """The text, or the path of a picture."""
    label: Any
    """A string; in JSONL whatever stands there, None for null."""


def read_table(path: Path, inputs: tuple[str, ...], labels: tuple[str, ...] = LABEL_COLUMNS) -> list[Row]:
    """The rows of a table in order.

    A CSV or TSV file may start with a header that names a column of `inputs` and one of `labels`, in any
    case; without one each line is an input and its label. In JSONL every line is an object with such fields.

    Raises:
        UserError: no such file, an unknown format, no UTF-8, a row without input, of another width or
            without the fields; an `id` that stands twice.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a table ({', '.join(SUFFIXES)}) of inputs and labels")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} is of an unknown format; labelled inputs come as {', '.join(SUFFIXES)}")
    rows = list(_jsonl(path, inputs, labels) if path.suffix == ".jsonl" else _table(path, inputs, labels))
    for row in rows:
        if not row.input:
            raise UserError(f"{path}, line {row.number} has no {inputs[0]}")
    return rows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with `\\n` at the ends of its lines; raises `UserError`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects of a JSONL file; raises `UserError` for a line that holds no object."""
    # Not splitlines(): texts may hold other line ends of Unicode.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            fields = None
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {number} is no JSON object")
        yield number, fields


def column(names: list[str], known: tuple[str, ...]) -> int | None:
    """Place of the first known name among `names`, whatever its case."""
    lowered = [name.strip().lower() for name in names]
    return next((lowered.index(name) for name in known if name in lowered), None)


def _jsonl(path: Path, inputs: tuple[str, ...], labels: tuple[str, ...]) -> Iterator[Row]:
    seen: dict[Any, int] = {}
    for number, fields in json_lines(path):
        names = list(fields)
        place, label = column(names, inputs), column(names, labels)
        if place is None or label is None:
            raise UserError(
                f"{path}, line {number} needs the fields {inputs[0]!r} and {labels[0]!r}, it has {', '.join(names)}"
            )
        if "id" in fields:
            _once(path, number, json.dumps(fields["id"]), seen)
        found = fields[names[place]]
        yield Row(number, found.strip() if isinstance(found, str) else "", fields[names[label]])


def _table(path: Path, inputs: tuple[str, ...], labels: tuple[str, ...]) -> Iterator[Row]:
    rows = list(_cells(path))
    header = rows[0][1] if rows else []
    width, start, place, label = len(header), 0, 0, -1
    columns = column(header, inputs), column(header, labels)
    if columns[0] is not None and columns[1] is not None:
        start, place, label = 1, columns[0], columns[1]
    elif width != 2:
        raise UserError(f"{path} has {width} columns and no header that names {inputs[0]!r} and {labels[0]!r}; add one")
    identity = column(header, ("id",)) if start else None
    seen: dict[Any, int] = {}
    for number, row in rows[start:]:
        if not any(row):
            continue
        if len(row) != width:
            raise UserError(f"{path}, line {number} has {len(row)} columns, the first line has {width}")
        if identity is not None:
            _once(path, number, row[identity], seen)
        yield Row(number, row[place].strip(), row[label].strip())


def _cells(path: Path) -> Iterator[tuple[int, list[str]]]:
    text = read_text(path)
    if path.suffix == ".tsv":  # no quoting: a quotation mark is a character like any other
        yield from ((n, line.split("\t")) for n, line in enumerate(text.split("\n"), start=1) if line)
        return
    csv.field_size_limit(_LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is no CSV ({error}); repair it") from None


def _once(path: Path, number: int, identity: str, seen: dict[Any, int]) -> None:
    if identity in seen:
        raise UserError(
            f"{path}, line {number} has the id {identity!r} of line {seen[identity]}; give each sample an id of its own"
        )
    seen[identity] = number
