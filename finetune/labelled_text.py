"""Texts with labels from TSV, CSV and JSONL files, or from a folder with one subfolder a class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from finetune.table import SUFFIXES, Row, read_table
from finetune.values import sorted_names

TEXT_COLUMNS = ("text", "sentence", "content", "document", "review")


@dataclass(frozen=True)
class LabelledText:
    """`n` texts and what is said of each: a class's name, or what a table has in its label column."""

    texts: list[str]
    labels: list[Any]
    lines: list[int]
    """Where each stands in the source, from 1."""
    source: Path

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all texts and labels in order."""
        pairs = list(zip(self.texts, self.labels, strict=True))
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def classes(self) -> list[str]:
        """The labels that occur, in numeric order where all are whole numbers, else alphabetically."""
        return sorted_names(set(self.labels))


def read_labelled_text(source: str | Path, one_class: bool = True) -> LabelledText:
    """Read labelled texts: tables as `read_table` does, or a folder whose subfolders are classes of `.txt` files.

    Args:
        one_class: labels name one class each; otherwise they stay as a table has them.

    Raises:
        UserError: nothing there, an unknown format, a line without text or label, no labels at all, labels
            so many that they can hardly be classes.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = list(_folder(path))
    elif not path.is_file():
        raise UserError(f"{path} does not exist; give a file of texts and labels, or a folder with one folder a class")
    elif path.suffix not in SUFFIXES:
        raise UserError(f"{path} is of an unknown format; texts and labels come as {', '.join(SUFFIXES)}")
    else:
        rows = read_table(path, TEXT_COLUMNS)
    if not rows:
        raise UserError(f"{path} holds no labelled texts")
    if one_class:
        rows = [row._replace(label=class_name(path, row)) for row in rows]
    read = LabelledText([row.input for row in rows], [row.label for row in rows], [row.number for row in rows], path)
    distinct = len(set(read.labels)) if one_class else 0
    if len(rows) >= 20 and distinct > len(rows) / 2:
        raise UserError(f"{path} has {distinct} different labels in {len(rows)} lines; is the label in another column?")
    return read


def class_name(path: Path, row: Row) -> str:
    """A row's label as the name of one class; raises `UserError` where there is none."""
    name = "" if row.label is None else str(row.label).strip()
    if not name:
        raise UserError(f"{path}, line {row.number} has no label")
    if isinstance(row.label, list | dict):
        raise UserError(
            f"{path}, line {row.number} has the label {name[:60]}; a class is one name (or use --task multi-label)"
        )
    return name


def _folder(path: Path) -> Iterator[Row]:
    folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    if not folders:
        raise UserError(f"{path} has no subfolders; put the .txt files of each class into a folder named after it")
    number = 0
    for folder in folders:
        files = sorted(folder.rglob("*.txt"))
        if not files:
            raise UserError(f"class folder {folder} holds no .txt files; fill it or remove it")
        for file in files:
            number += 1
            text = file.read_text(encoding="utf-8", errors="replace").strip()
            if not text:
                raise UserError(f"{file} is empty; write its text or remove it")
            yield Row(number, text, folder.name)
