"""Writing so that a reader, or a crash, never meets half a file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def write_atomically(path: Path, payload: bytes | str) -> None:
    """Write beside `path`, force to disk, then rename: the old file or the new one, nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(payload.encode() if isinstance(payload, str) else payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's entries (creations, renames), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
