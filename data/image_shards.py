"""Folders of picture files -> shards."""

from __future__ import annotations

import csv
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.errors import UserError
from data.images import UnreadableImage, verify
from data.index import IMAGE_PARTS
from data.keyed import hash64
from data.shards import DatasetWriter, check_free

_ORDER_SEED = 0x0D3A
_THREADS = min(8, (os.cpu_count() or 1) + 2)
_PIECE = 8
"""Files that a thread reads at a time; a few pieces a thread are in memory."""


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
    check_free(out, overwrite)
    files = _from_csv(source, labels) if labels else _from_folders(source)
    if not files:
        raise UserError(f"{source} holds no pictures ({', '.join(IMAGE_PARTS)})")
    classes = _sorted({label for _, label in files if label is not None})
    numbers: dict[str | None, int] = {label: number for number, label in enumerate(classes)}
    order = np.argsort(hash64(_ORDER_SEED, np.arange(len(files), dtype=np.int64)), kind="stable").tolist()
    keys = _unique_keys([path for path, _ in files])
    unreadable: list[tuple[str, str]] = []
    with DatasetWriter(out, "images", samples_per_shard, overwrite) as writer:
        writer.extra = {"classes": [_printable(name) for name in classes]}
        payloads = _payloads(source, [files[place][0] for place in order])
        bar = tqdm(order, desc="sharding", unit="image", disable=None if progress else True)
        for place, payload in zip(bar, payloads, strict=True):
            path, label = files[place]
            if isinstance(payload, str):
                unreadable.append((_printable(path), payload))
                continue
            writer.add(keys[place], {_extension(path): payload}, numbers.get(label, -1))
    written = len(files) - len(unreadable)
    shards = -(-written // samples_per_shard)
    return {"samples": written, "classes": writer.extra["classes"], "shards": shards, "unreadable": unreadable}


def _payloads(source: Path, paths: list[str]) -> Iterator[bytes | str]:
    """Each file's bytes, or the reason why it cannot be used, in order; threads read and verify ahead."""
    pieces = (paths[first : first + _PIECE] for first in range(0, len(paths), _PIECE))
    ahead: deque[Future[list[bytes | str]]] = deque()
    pool = ThreadPoolExecutor(_THREADS)
    try:
        for piece in pieces:
            ahead.append(pool.submit(_read, source, piece))
            if len(ahead) > 2 * _THREADS:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(source: Path, paths: list[str]) -> list[bytes | str]:
    found: list[bytes | str] = []
    for path in paths:
        try:
            with open(os.path.join(source, path), "rb") as file:
                payload = file.read()
            verify(payload)
            found.append(payload)
        except OSError as error:
            found.append(error.strerror or str(error))
        except UnreadableImage as error:
            found.append(str(error))
    return found


def _from_folders(source: Path) -> list[tuple[str, str | None]]:
    paths = sorted(_pictures(source), key=lambda path: path.split("/"))
    return [(path, path.partition("/")[0] if "/" in path else None) for path in paths]


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
            if not name.startswith(".") and _extension(name) in IMAGE_PARTS:
                yield name if below == "." else f"{below}/{name}"


def _unreadable_folder(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}; change its permissions or remove it")


def _sorted(labels: set[str]) -> list[str]:
    """By number where all are numbers (so that 2 comes before 10), else as text."""
    if all(label.isascii() and label.isdigit() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _extension(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _printable(name: str) -> str:
    """Names that are not UTF-8 on disk, made so."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _from_csv(source: Path, table: Path) -> list[tuple[str, str | None]]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the labels in {table}: {error}") from None
    if not rows or not {"file", "label"} <= set(rows[0]):
        raise UserError(f"{table} needs a header with the columns 'file' and 'label', and rows below it")
    files: list[tuple[str, str | None]] = []
    for number, row in enumerate(rows, start=2):
        name = row["file"] or ""
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not (source / path).is_file():
            raise UserError(f"{table}, line {number}: {name!r} is no file below {source}")
        if _extension(name) not in IMAGE_PARTS:
            raise UserError(f"{table}, line {number}: {name!r} is no picture ({', '.join(IMAGE_PARTS)})")
        if not row["label"]:
            raise UserError(f"{table}, line {number}: {name!r} has no label")
        files.append((path.as_posix(), row["label"]))
    if len({path for path, _ in files}) < len(files):
        raise UserError(f"{table} names the same file twice; each file may have one label")
    return files


def _unique_keys(paths: list[str]) -> list[str]:
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
