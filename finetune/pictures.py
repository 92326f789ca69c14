"""Labelled pictures outside shards: a folder of class folders, or a table of paths and labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data.errors import DamagedData, UserError
from data.index import IMAGE_PARTS
from data.picture_files import extension_of, from_folders, printable, sorted_labels
from finetune.table import read_table

Ints = NDArray[np.int64]
FILE_COLUMNS = ("file", "path", "image", "picture", "filename", "file_name")


class PictureSource(Protocol):
    """Encoded pictures by number: a `ShardedDataset`, or `PictureFiles`."""

    def pictures(self, ids: Ints) -> tuple[list[bytes], Ints]:
        """Encoded pictures and labels, int64 (n,); raises `DamagedData`."""

    def key(self, identity: int) -> str:
        """The name of one."""


@dataclass(frozen=True)
class PictureFiles:
    """Files, read at each use; the reader applies the formats and bounds of `data.images`."""

    paths: list[Path]

    def pictures(self, ids: Ints) -> tuple[list[bytes], Ints]:
        """Their bytes; labels are kept elsewhere (-1)."""
        payloads = []
        for identity in ids.tolist():
            try:
                payloads.append(self.paths[identity].read_bytes())
            except OSError as error:
                raise DamagedData(f"{self.paths[identity]} cannot be read: {error.strerror}") from None
        return payloads, np.full(len(ids), -1, dtype=np.int64)

    def key(self, identity: int) -> str:
        """The path."""
        return printable(str(self.paths[identity]))


@dataclass(frozen=True)
class LabelledPictures:
    """`n` picture files and what is said of each."""

    files: PictureFiles
    names: list[str]
    """Paths as they are written, below the source: the roots of held-out shares."""
    labels: list[Any]
    lines: list[int]
    """Line of each in the table, from 1; place in order where the source is a folder."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes in bytes and labels, in order."""
        sizes = [path.stat().st_size for path in self.files.paths]
        rows = [[printable(name), *rest] for name, *rest in zip(self.names, sizes, self.labels, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_class_folders(source: Path) -> tuple[LabelledPictures, list[str]]:
    """Pictures labelled by the first folder below `source`, and the folders' names; hidden files are passed over.

    Raises:
        UserError: no pictures, none in a folder, or a class folder without any.
    """
    files = from_folders(source)
    if not files:
        raise UserError(f"{source} holds no pictures ({', '.join(IMAGE_PARTS)}); give shards, class folders or a table")
    labelled = [(path, label) for path, label in files if label is not None]
    if not labelled:
        raise UserError(f"{source} has no subfolders; put the pictures of each class into a folder named after it")
    folders = {path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")}
    names = sorted_labels(folders)
    empty = sorted(folders - {label for _, label in labelled})
    if empty:
        raise UserError(f"class folder {source / empty[0]} holds no pictures; fill it or remove it")
    paths = [path for path, _ in labelled]
    found = PictureFiles([source / path for path in paths])
    return LabelledPictures(found, paths, [label for _, label in labelled], list(range(1, len(paths) + 1))), names


def read_picture_table(table: Path) -> LabelledPictures:
    """Pictures and labels of a table; paths are absolute, or relative to the table's folder.

    Raises:
        UserError: what `read_table` refuses, a file that is missing, no picture by its ending, or named twice.
    """
    rows = read_table(table, FILE_COLUMNS)
    if not rows:
        raise UserError(f"{table} holds no labelled pictures")
    paths: dict[Path, int] = {}
    for row in rows:
        path = table.parent / Path(row.input).expanduser()
        if not path.is_file():
            raise UserError(f"{table}, line {row.number}: {row.input[:80]!r} is no picture file in {table.parent}")
        if extension_of(row.input) not in IMAGE_PARTS:
            raise UserError(f"{table}, line {row.number}: {row.input!r} is no picture ({', '.join(IMAGE_PARTS)})")
        if path in paths:
            raise UserError(f"{table}, line {row.number} names {row.input!r} again (first in line {paths[path]})")
        paths[path] = row.number
    found = PictureFiles(list(paths))
    return LabelledPictures(found, [row.input for row in rows], [row.label for row in rows], list(paths.values()))


def undecodable(source: PictureSource, found: Sequence[tuple[int, str]]) -> DamagedData:
    """What to say of pictures (number, reason) that cannot be decoded."""
    first, reason = found[0]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return DamagedData(
        f"picture {source.key(first)} cannot be decoded: {reason}{more}; remove it, or use "
        "`headwater shard images`, which leaves such pictures out"
    )
