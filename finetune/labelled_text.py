"""Texts with labels from TSV, CSV and JSONL files, or from a folder with one subfolder a class."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError

TEXT_COLUMNS = ("text", "sentence", "content", "document", "review")
LABEL_COLUMNS = ("label", "class", "category", "target")
SUFFIXES = (".tsv", ".csv", ".jsonl")


@dataclass(frozen=True)
class LabelledText:
    """`n` texts and the names of their classes."""

    texts: list[str]
    labels: list[str]
    source: Path

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all texts and labels in order."""
        pairs = list(zip(self.texts, self.labels, strict=True))
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def classes(self) -> list[str]:
        """The labels that occur, in numeric order where all are whole numbers, else alphabetically."""
        names = set(self.labels)
        if all(name.lstrip("-").isdigit() for name in names):
            return sorted(names, key=lambda name: (int(name), name))
        return sorted(names)


def read_labelled_text(source: str | Path) -> LabelledText:
    """Read labelled texts.

    A TSV or CSV file may start with a header that names a text column (`text`, `sentence`, …) and a
    label column (`label`, …); without one, each line is a text and its label. In JSONL every line is an
    object with these fields. In a folder, each subfolder is a class of `.txt` files.

    Raises:
        UserError: nothing there, an unknown format, a line without text or label, no labels at all.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        pairs = list(_folder(path))
    elif not path.is_file():
        raise UserError(f"{path} does not exist; give a file of texts and labels, or a folder with one folder a class")
    elif path.suffix == ".jsonl":
        pairs = list(_jsonl(path))
    elif path.suffix in (".tsv", ".csv"):
        pairs = list(_table(path))
    else:
        raise UserError(f"{path} is of an unknown format; texts and labels come as {', '.join(SUFFIXES)}")
    if not pairs:
        raise UserError(f"{path} holds no labelled texts")
    read = LabelledText([text for text, _ in pairs], [label for _, label in pairs], path)
    distinct = len(set(read.labels))
    if len(pairs) >= 20 and distinct > len(pairs) / 2:
        raise UserError(
            f"{path} has {distinct} different labels in {len(pairs)} lines; is the label in another column?"
        )
    return read


def _folder(path: Path) -> Iterator[tuple[str, str]]:
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    if not folders:
        raise UserError(f"{path} has no subfolders; put the .txt files of each class into a folder named after it")
    for folder in folders:
        files = sorted(folder.rglob("*.txt"))
        if not files:
            raise UserError(f"class folder {folder} holds no .txt files; fill it or remove it")
        for file in files:
            yield file.read_text(encoding="utf-8", errors="replace").strip(), folder.name


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None


def _jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            fields = None
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {number} is no JSON object")
        names = list(fields)
        text, label = _column(names, TEXT_COLUMNS), _column(names, LABEL_COLUMNS)
        if text is None or label is None:
            raise UserError(f"{path}, line {number} needs the fields 'text' and 'label', it has {', '.join(names)}")
        yield _pair(path, number, str(fields[names[text]]), fields[names[label]])


def _table(path: Path) -> Iterator[tuple[str, str]]:
    # Tab-separated text has no quoting: a quotation mark is a character like any other.
    lines = _lines(path)
    rows = list(csv.reader(lines)) if path.suffix == ".csv" else [line.split("\t") for line in lines]
    start, text, label = 0, 0, -1
    header = rows[0] if rows else []
    columns = _column(header, TEXT_COLUMNS), _column(header, LABEL_COLUMNS)
    if columns[0] is not None and columns[1] is not None:
        start, text, label = 1, columns[0], columns[1]
    width = len(header)
    if not start and width != 2:
        raise UserError(f"{path} has {width} columns and no header that names 'text' and 'label'; add one")
    for number, row in enumerate(rows[start:], start=start + 1):
        if not any(row):
            continue
        if len(row) != width:
            raise UserError(f"{path}, line {number} has {len(row)} columns, the first line has {width}")
        yield _pair(path, number, row[text], row[label])


def _pair(path: Path, number: int, text: str, label: object) -> tuple[str, str]:
    name = "" if label is None else str(label).strip()
    if not name:
        raise UserError(f"{path}, line {number} has no label")
    if not text.strip():
        raise UserError(f"{path}, line {number} has no text")
    return text.strip(), name


def _column(names: list[str], known: tuple[str, ...]) -> int | None:
    """Place of the first known name among `names`, whatever its case."""
    lowered = [name.strip().lower() for name in names]
    return next((lowered.index(name) for name in known if name in lowered), None)
