"""Rows of predictions as CSV, TSV or JSON lines: on standard output as they come, or in a file that appears whole."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from data.errors import UserError
from data.files import sync

RowFormat = Literal["csv", "tsv", "jsonl"]
ROW_FORMATS: tuple[RowFormat, ...] = ("csv", "tsv", "jsonl")
Write = Callable[[dict[str, Any]], None]


def format_of(path: Path | None, named: str | None) -> RowFormat:
    """The format that was named, else that of the file's ending, else TSV without a file.

    Raises:
        UserError: an ending that names none.
    """
    wanted = named or (path.suffix[1:] if path is not None else "tsv")
    for known in ROW_FORMATS:
        if wanted == known:
            return known
    raise UserError(f"predictions are written as .csv, .tsv or .jsonl, not to {path}; rename it or pass --format")


@contextmanager
def written_rows(path: Path | None, named: str | None = None) -> Iterator[Write]:
    """A function that writes a row; a file is forced to disk and takes its name after the block.

    CSV and TSV begin with the names of the columns, except TSV on standard output. TSV has no quoting, so tabs
    and line breaks inside a value become spaces there.

    Raises:
        UserError: see `format_of`; or a folder that does not exist or cannot be written to.
    """
    layout = format_of(path, named)
    if path is None:
        yield _writer(sys.stdout, layout, header=layout != "tsv")
        sys.stdout.flush()
        return
    if not path.parent.is_dir():
        raise UserError(f"folder {path.parent} does not exist; make it first")
    hidden = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            file = open(hidden, "w", encoding="utf-8", errors="surrogateescape", newline="")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        with file:
            yield _writer(file, layout, header=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
        sync(path.parent)
    finally:
        hidden.unlink(missing_ok=True)


def _writer(file: IO[str], layout: RowFormat, header: bool) -> Write:
    if layout == "jsonl":
        return lambda row: print(json.dumps(row, ensure_ascii=False), file=file)
    quoting = csv.writer(file, lineterminator="\n")
    first = header

    def write(row: dict[str, Any]) -> None:
        nonlocal first
        lines = ([list(row)] if first else []) + [[_cell(value, layout) for value in row.values()]]
        first = False
        for line in lines:
            if layout == "csv":
                quoting.writerow(line)
            else:
                print("\t".join(" ".join(cell.splitlines()).replace("\t", " ") for cell in line), file=file)

    return write


def _cell(value: Any, layout: RowFormat) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if layout == "tsv" else repr(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
