"""Writing one shard of pictures: a job that any process can do, with the same bytes each time."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.images import UnreadableImage
from data.picture_files import extension_of, printable
from data.reencode import Remaking, Stored
from data.shard_file import ShardFile

_PIECE = 8
"""Files that a thread reads at a time; a few pieces a thread are in memory."""


class Picture(NamedTuple):
    """A picture to be stored."""

    path: str
    """Below the source."""
    key: str
    label: int
    """Class number, -1 without one."""


@dataclass(frozen=True)
class ShardJob:
    """All that it takes to write one shard."""

    tar: Path
    source: Path
    pictures: Sequence[Picture]
    remaking: Remaking
    beside: tuple[str, ...] = ()
    """Extensions of files of the same name that are stored with a picture (`txt`, `json`)."""
    threads: int = 1


@dataclass(frozen=True)
class ShardDone:
    """What came of it."""

    entry: dict[str, Any] | None
    """The manifest's entry; None when no picture could be read."""
    unreadable: list[tuple[str, str]]
    """(file, reason) pairs."""
    remade: int
    """Pictures that were encoded anew."""
    bytes_read: int
    bytes_stored: int


def write_shard(job: ShardJob) -> ShardDone:
    """Read, check and store the job's pictures; raises `OSError` when the shard cannot be written."""
    unreadable: list[tuple[str, str]] = []
    shard: ShardFile | None = None
    remade = read = stored = 0
    try:
        for picture, found in zip(job.pictures, _stored(job), strict=True):
            if isinstance(found, str):
                unreadable.append((printable(picture.path), found))
                continue
            result, size, beside = found
            shard = shard or ShardFile(job.tar)
            shard.add(picture.key, {result.extension: result.payload} | beside, picture.label)
            remade, read, stored = remade + result.remade, read + size, stored + len(result.payload)
        entry = shard.close() if shard is not None else None
        shard = None
    finally:
        if shard is not None:
            shard.abandon()
    return ShardDone(entry, unreadable, remade, read, stored)


Found = tuple[Stored, int, dict[str, bytes]] | str
"""A picture with its file's size and what lies beside it, or the reason why it cannot be used."""


def _stored(job: ShardJob) -> Iterator[Found]:
    """Each picture in order; threads read and check ahead."""
    pieces = (job.pictures[first : first + _PIECE] for first in range(0, len(job.pictures), _PIECE))
    if job.threads <= 1:
        for piece in pieces:
            yield from _read(job, piece)
        return
    ahead: deque[Future[list[Found]]] = deque()
    pool = ThreadPoolExecutor(job.threads)
    try:
        for piece in pieces:
            ahead.append(pool.submit(_read, job, piece))
            if len(ahead) > 2 * job.threads:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _read(job: ShardJob, pictures: Sequence[Picture]) -> list[Found]:
    found: list[Found] = []
    for picture in pictures:
        path = os.path.join(job.source, picture.path)
        try:
            payload = _bytes(path)
            stored = job.remaking(payload, extension_of(picture.path))
            found.append((stored, len(payload), _beside(path, job.beside)))
        except OSError as error:
            found.append(error.strerror or str(error))
        except UnreadableImage as error:
            found.append(str(error))
    return found


def _beside(path: str, extensions: tuple[str, ...]) -> dict[str, bytes]:
    stem, found = os.path.splitext(path)[0], {}
    for extension in extensions:
        with suppress(FileNotFoundError):
            found[extension] = _bytes(f"{stem}.{extension}")
    return found


def _bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
