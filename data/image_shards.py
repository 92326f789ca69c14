"""Folders of picture files -> shards."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.errors import UserError
from data.images import UnreadableImage, open_image
from data.index import IMAGE_PARTS
from data.keyed import hash64
from data.shards import DatasetWriter

_ORDER_SEED = 0x0D3A


def shard_images(
    source: Path,
    out: Path,
    *,
    labels: Path | None = None,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write every picture under `source` into shards at `out`.

    Labels come from the first folder below `source`, or from a CSV with the columns `file` and `label`
    (only the files it names are taken). Pictures are stored as they are, in a fixed pseudo-random order,
    so that a class-sorted folder does not make class-sorted shards. Each is decoded once; those that
    cannot be are left out and listed.

    Returns:
        `samples`, `classes`, `shards`, and `unreadable`: (file, reason) pairs.

    Raises:
        UserError: no such folder, no pictures in it, a CSV that names a missing file, `out` exists.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give the folder that holds the pictures")
    files = _from_csv(source, labels) if labels else _from_folders(source)
    if not files:
        raise UserError(f"{source} holds no pictures ({', '.join(IMAGE_PARTS)})")
    classes = sorted({label for _, label in files if label is not None})
    numbers = {label: number for number, label in enumerate(classes)}
    order = np.argsort(hash64(_ORDER_SEED, np.arange(len(files), dtype=np.int64)), kind="stable")
    unreadable: list[tuple[str, str]] = []
    keys = _unique_keys([path for path, _ in files])
    written = 0
    with DatasetWriter(out, "images", samples_per_shard, overwrite) as writer:
        writer.extra = {"classes": classes}
        for place in tqdm(order, desc="sharding", unit="image", disable=None if progress else True):
            path, label = files[place]
            try:
                payload = (source / path).read_bytes()
                open_image(payload)
            except (OSError, UnreadableImage) as error:
                unreadable.append((str(path), str(error)))
                continue
            extension = path.suffix[1:].lower()
            writer.add(keys[place], {extension: payload}, -1 if label is None else numbers[label])
            written += 1
    shards = -(-written // samples_per_shard)
    return {"samples": written, "classes": classes, "shards": shards, "unreadable": unreadable}


def _from_folders(source: Path) -> list[tuple[Path, str | None]]:
    paths = [path.relative_to(source) for path in sorted(_pictures(source))]
    return [(path, path.parts[0] if len(path.parts) > 1 else None) for path in paths]


def _pictures(source: Path) -> Iterator[Path]:
    for path in source.rglob("*"):
        if path.suffix[1:].lower() in IMAGE_PARTS and not path.name.startswith(".") and path.is_file():
            yield path


def _from_csv(source: Path, table: Path) -> list[tuple[Path, str | None]]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the labels in {table}: {error}") from None
    if not rows or not {"file", "label"} <= set(rows[0]):
        raise UserError(f"{table} needs a header with the columns 'file' and 'label', and rows below it")
    files: list[tuple[Path, str | None]] = []
    for number, row in enumerate(rows, start=2):
        path = Path(row["file"] or "")
        if path.is_absolute() or ".." in path.parts or not (source / path).is_file():
            raise UserError(f"{table}, line {number}: {row['file']!r} is no file below {source}")
        if not row["label"]:
            raise UserError(f"{table}, line {number}: {row['file']!r} has no label")
        files.append((path, row["label"]))
    if len({path for path, _ in files}) < len(files):
        raise UserError(f"{table} names the same file twice; each file may have one label")
    return files


def _unique_keys(paths: list[Path]) -> list[str]:
    """Keys without dots in the base name; files that differ only in their extension get it appended."""
    keys = [path.with_suffix("").as_posix() for path in paths]
    seen: set[str] = set()
    unique = []
    for key, path in zip(keys, paths, strict=True):
        folder, slash, base = key.rpartition("/")
        candidate = (folder + slash + base.replace(".", "_")).replace("\n", "_")
        suffix = candidate
        number = 1
        while suffix in seen:
            suffix = f"{candidate}_{path.suffix[1:].lower()}" + (f"{number}" if number > 1 else "")
            number += 1
        seen.add(suffix)
        unique.append(suffix)
    return unique
