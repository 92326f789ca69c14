"""Writing so that a reader, or a crash, never meets half a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

Bytes = bytes | bytearray | memoryview


class Disk:
    """The operations by which something becomes durable, one method each.

    Everything below, and all that a checkpoint does to its folder, goes through `disk`; tests put one in its
    place that counts, and fails or stops at the n-th operation.
    """

    def open(self, path: Path) -> FileIO:
        """A new, empty file, unbuffered, so that every `write` is an operation of its own."""
        return FileIO(path, "wb")

    def write(self, file: FileIO, data: Bytes) -> None:
        """All of `data`; the system may take it in parts."""
        left = memoryview(data).cast("B")
        while len(left):
            left = left[file.write(left) :]

    def fsync(self, descriptor: int) -> None:
        """Force a file's bytes, or a folder's entries, to disk."""
        os.fsync(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """In one step; an existing file `new` is replaced."""
        os.replace(old, new)

    def mkdir(self, path: Path) -> None:
        """A folder, unless it is there; its parent exists."""
        path.mkdir(exist_ok=True)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink(missing_ok=True)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()


disk = Disk()


def write_durably(path: Path, chunks: Iterable[Bytes]) -> None:
    """Write `chunks` to the new file `path` and force them to disk; for folders that nobody reads yet."""
    with disk.open(path) as file:
        for chunk in chunks:
            disk.write(file, chunk)
        disk.fsync(file.fileno())


def write_atomically(path: Path, payload: bytes | str) -> None:
    """Write beside `path`, force to disk, then rename: the old file or the new one, nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_durably(temporary, [payload.encode() if isinstance(payload, str) else payload])
        disk.rename(temporary, path)
    except BaseException:
        disk.unlink(temporary)
        raise
    sync(path.parent)


def append(path: Path, data: Bytes) -> None:
    """Add `data` at the end of a file, all or, where the disk is full, nothing; not forced to disk."""
    with FileIO(path, "ab") as file:
        end = file.seek(0, os.SEEK_END)
        try:
            disk.write(file, data)
        except OSError:
            file.truncate(end)
            raise


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries (creations, renames), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Remove a folder and what is in it; one that is not there is left so."""
    if path.is_symlink() or not path.is_dir():
        return disk.unlink(path)
    for inner in sorted(path.iterdir()):
        remove_folder(inner)
    disk.rmdir(path)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
