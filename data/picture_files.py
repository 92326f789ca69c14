"""Which pictures a folder holds, how they are labelled, and under which keys they are stored."""

from __future__ import annotations

import csv
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from data.errors import UserError
from data.index import IMAGE_PARTS

Labelled = tuple[str, str | None]
"""A path below the source, and its label's name."""


def from_folders(source: Path) -> list[Labelled]:
    """Every picture below `source`, labelled by its first folder; in the order of their paths."""
    paths = sorted(_pictures(source), key=lambda path: path.split("/"))
    return [(path, path.partition("/")[0] if "/" in path else None) for path in paths]


def from_csv(source: Path, table: Path) -> list[Labelled]:
    """The pictures and labels of a table; raises `UserError` for a line that names no picture or no label."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the labels in {table}: {error}") from None
    if not rows or not {"file", "label"} <= set(rows[0]):
        raise UserError(f"{table} needs a header with the columns 'file' and 'label', and rows below it")
    files: list[Labelled] = []
    for number, row in enumerate(rows, start=2):
        name = row["file"] or ""
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not (source / path).is_file():
            raise UserError(f"{table}, line {number}: {name!r} is no file below {source}")
        if extension_of(name) not in IMAGE_PARTS:
            raise UserError(f"{table}, line {number}: {name!r} is no picture ({', '.join(IMAGE_PARTS)})")
        if not row["label"]:
            raise UserError(f"{table}, line {number}: {name!r} has no label")
        files.append((path.as_posix(), row["label"]))
    if len({path for path, _ in files}) < len(files):
        raise UserError(f"{table} names the same file twice; each file may have one label")
    return files


def _pictures(source: Path) -> Iterator[str]:
    """Paths below `source` of the files that are named like pictures; hidden ones are passed over.

    Links to folders are followed (class folders are often links), each folder once.
    """
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(source, followlinks=True, onerror=_unreadable_folder):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(folder, source)
        for name in names:
            if not name.startswith(".") and extension_of(name) in IMAGE_PARTS:
                yield name if below == "." else f"{below}/{name}"


def _unreadable_folder(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; change its permissions or remove it")


def sorted_labels(labels: set[str]) -> list[str]:
    """By number where all are numbers (so that 2 comes before 10), else as text."""
    if all(label.isascii() and label.isdigit() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def printable(name: str) -> str:
    """Names that are not UTF-8 on disk, made so."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def extension_of(path: str) -> str:
    """In lower case, without the dot."""
    return os.path.splitext(path)[1][1:].lower()


def unique_keys(paths: list[str]) -> list[str]:
    """Keys without dots in the base name; files that differ only in their extension get it appended."""
    seen: dict[str, None] = {}
    for path in paths:
        folder, slash, base = path.rpartition("/")
        stem, extension = os.path.splitext(base)
        wanted = key = (folder + slash + stem.replace(".", "_")).replace("\n", "_")
        number = 1
        while key in seen:
            key = f"{wanted}_{extension[1:].lower()}" + (f"{number}" if number > 1 else "")
            number += 1
        seen[key] = None
    return list(seen)


class Kept(NamedTuple):
    """What is left of a list of pictures without its duplicates."""

    files: list[Labelled]
    duplicates: int
    """Pictures left out because an earlier one has the same bytes."""
    disputed: int
    """Those of them that had another label than the one that stays."""


def without_duplicates(source: Path, files: Sequence[Labelled]) -> Kept:
    """The first picture of each content, by SHA-256 of its bytes; only files of one size are read."""
    sizes: dict[int, list[int]] = defaultdict(list)
    for number, (path, _) in enumerate(files):
        try:
            sizes[os.stat(source / path).st_size].append(number)
        except OSError:  # unreadable: found out, and named, when it is stored
            sizes[-1 - number].append(number)
    alike = [number for numbers in sizes.values() if len(numbers) > 1 for number in numbers]
    with ThreadPoolExecutor(8) as pool:
        digests = dict(zip(alike, pool.map(lambda n: _digest(source / files[n][0], n), alike), strict=True))
    kept: list[Labelled] = []
    first: dict[bytes, str | None] = {}
    disputed = 0
    for number, (path, label) in enumerate(files):
        content = digests.get(number)
        if content is not None and content in first:
            disputed += first[content] != label
            continue
        if content is not None:
            first[content] = label
        kept.append((path, label))
    return Kept(kept, len(files) - len(kept), disputed)


def _digest(path: Path, number: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return f"unreadable {number}".encode()
