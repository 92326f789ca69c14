"""What `predict` reads: pictures and texts from files, folders, patterns, shards, tables and standard input, lazily."""

from __future__ import annotations

import csv
import glob
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data.dataset import ShardedDataset
from data.errors import DamagedData, UserError
from data.index import IMAGE_PARTS
from finetune.labelled_text import TEXT_COLUMNS
from finetune.tagged_text import WORD_FIELDS

Picture = tuple[str, bytes | str]
"""Name and encoded bytes; where they could not be read, name and reason."""
_TABLES = (".tsv", ".csv", ".jsonl")
_READ = 64


def pictures(inputs: Sequence[str | Path]) -> Iterator[Picture]:
    """Pictures of files, folders (to any depth), patterns (`new/*.jpg`), shards, or paths on standard input (`-`).

    Raises:
        UserError: an input that does not exist, or a folder without pictures; before anything is yielded.
    """
    missing = [given for given in inputs if str(given) != "-" and not _found(given)]
    if missing:
        raise UserError(f"{missing[0]} does not exist; give picture files, folders, shards or a pattern of files")
    return _pictures(inputs)


def _pictures(inputs: Sequence[str | Path]) -> Iterator[Picture]:
    for given in inputs:
        path = Path(given).expanduser()
        if str(given) == "-":
            yield from (_picture(Path(line.rstrip("\n"))) for line in sys.stdin if line.strip())
        elif (path / "dataset.json").is_file() or path.suffix == ".tar":
            yield from _shards(str(path))
        elif path.is_dir():
            yield from _folder(path)
        elif exists(path):
            yield _picture(path)
        else:
            yield from (_picture(Path(name)) for name in sorted(glob.glob(str(path), recursive=True)))


def _folder(path: Path) -> Iterator[Picture]:
    empty = True
    for file in sorted(path.rglob("*")):
        if file.suffix[1:].lower() in IMAGE_PARTS:
            empty = False
            yield _picture(file)
    if empty:
        raise UserError(f"{path} holds no pictures ({', '.join(IMAGE_PARTS)})")


def _picture(path: Path) -> Picture:
    try:
        return str(path), path.read_bytes()
    except OSError as error:
        return str(path), error.strerror or str(error)


def _shards(source: str) -> Iterator[Picture]:
    dataset = ShardedDataset(source, context=1)
    if dataset.kind != "images":
        raise UserError(f"the model is for images, but {source} holds {dataset.kind}")
    ids = dataset.all_ids()
    for start in range(0, len(ids), _READ):
        part = ids[start : start + _READ]
        try:
            payloads: list[bytes | str] = list(dataset.pictures(part)[0])
        except DamagedData as error:
            payloads = [str(error)] * len(part)
        yield from zip((dataset.key(int(i)) for i in part), payloads, strict=True)


def texts(inputs: Sequence[str | Path], column: str | None = None) -> Iterator[str]:
    """Texts of files, folders, tables, patterns, standard input (`-`), or the strings themselves.

    `.txt` and unknown endings: each line is a text. `.csv`, `.tsv`, `.jsonl`: the `column`, else the one whose
    name says that it is text, else the first; in `.jsonl` it may hold a list of words. A folder: each `.txt` file is
    a text.

    Raises:
        UserError: a file that does not exist, a column that is missing; files are checked before anything is
            yielded.
    """
    for given in inputs:
        path = Path(given)
        named = isinstance(given, Path) or path.suffix in (".txt", *_TABLES)
        if str(given) != "-" and named and not _found(given):
            raise UserError(f"{path} does not exist; give text files, '-' for standard input, or the texts themselves")
    return _texts(inputs, column)


def _texts(inputs: Sequence[str | Path], column: str | None) -> Iterator[str]:
    for given in inputs:
        path = Path(given).expanduser()
        if str(given) == "-":
            yield from _lines(sys.stdin)
        elif exists(path):
            yield from _texts_of(path, column)
        elif path.suffix in (".txt", *_TABLES):
            for name in sorted(glob.glob(str(path), recursive=True)):
                yield from _texts_of(Path(name), column)
        else:
            yield str(given)


def _texts_of(path: Path, column: str | None) -> Iterator[str]:
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise UserError(f"{path} holds no .txt files")
        for each in files:
            yield each.read_text(encoding="utf-8-sig", errors="replace").strip()
        return
    with open(path, encoding="utf-8-sig", errors="replace", newline="" if path.suffix == ".csv" else None) as file:
        if path.suffix == ".jsonl":
            yield from _objects(file, path, column)
        elif path.suffix == ".csv":
            yield from _cells(csv.reader(file), path, column)
        elif path.suffix == ".tsv":
            # Tab-separated text has no quoting: a quotation mark is a character like any other.
            yield from _cells((line.rstrip("\r\n").split("\t") for line in file), path, column)
        else:
            yield from _lines(file)


def _lines(file: Iterable[str]) -> Iterator[str]:
    return (line.rstrip("\r\n") for line in file if line.strip())


def _objects(file: Iterable[str], path: Path, column: str | None) -> Iterator[str]:
    wanted = (column,) if column else TEXT_COLUMNS
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            fields = {name if column else str(name).lower(): value for name, value in json.loads(line).items()}
            lists = () if column else [name for name in WORD_FIELDS if isinstance(fields.get(name), list)]
            value = next(fields[name] for name in (*wanted, *lists) if name in fields)
            yield " ".join(map(str, value)) if isinstance(value, list) else str(value)
        except (json.JSONDecodeError, AttributeError, StopIteration):
            raise UserError(f"{path}, line {number} is no JSON object with the field {wanted[0]!r}") from None


def _cells(rows: Iterator[list[str]], path: Path, column: str | None) -> Iterator[str]:
    header = next(rows, [])
    lowered = [name.strip().lower() for name in header]
    if column is not None and column not in header:
        raise UserError(f"{path} has no column {column!r}; its columns are {', '.join(header)}")
    named = header.index(column) if column is not None else None
    if named is None:
        named = next((lowered.index(name) for name in TEXT_COLUMNS if name in lowered), None)
    place = named or 0
    if named is None and any(header):
        yield header[0]
    for number, row in enumerate(rows, start=2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) <= place:
            raise UserError(f"{path}, row {number} has {len(row)} columns and no text")
        yield row[place]


def _found(given: str | Path) -> bool:
    path = Path(given).expanduser()
    return exists(path) or (not isinstance(given, Path) and any(glob.iglob(str(path), recursive=True)))


def exists(path: Path) -> bool:
    """Whether it does; a long sentence is no path, and asking the system about it fails."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
