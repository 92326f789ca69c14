"""A disk that stops, or fills up, at the n-th operation of a save."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

from data.files import Bytes, Disk


class Crash(BaseException):
    """The machine stops here; nothing that comes after reaches the disk."""


class BrokenDisk(Disk):
    """Does what the true one does until operation `at`; a write is then half done."""

    def __init__(self, at: int, kind: str = "crash", only: tuple[str, ...] = (), count: float = math.inf) -> None:
        """`kind` is `crash`, after which no operation does anything, or `full`, after which `count` fail with ENOSPC.

        Operations not named in `only`, if anything is, go on and do not count.
        """
        self.at, self.kind, self.only, self.count = at, kind, only, count
        self.operations: list[str] = []

    @property
    def broken(self) -> bool:
        """Whether the operation `at` was reached."""
        return len(self.operations) >= self.at

    def open(self, path: Path) -> FileIO:
        return self._do("open", lambda: super(BrokenDisk, self).open(path))

    def write(self, file: FileIO, data: Bytes) -> None:
        half = memoryview(data).cast("B")[: len(data) // 2]
        self._do("write", lambda: super(BrokenDisk, self).write(file, data), lambda: file.write(half))

    def fsync(self, descriptor: int) -> None:
        self._do("fsync", lambda: super(BrokenDisk, self).fsync(descriptor))

    def rename(self, old: Path, new: Path) -> None:
        self._do("rename", lambda: super(BrokenDisk, self).rename(old, new))

    def mkdir(self, path: Path) -> None:
        self._do("mkdir", lambda: super(BrokenDisk, self).mkdir(path))

    def unlink(self, path: Path) -> None:
        self._do("unlink", lambda: super(BrokenDisk, self).unlink(path))

    def rmdir(self, path: Path) -> None:
        self._do("rmdir", lambda: super(BrokenDisk, self).rmdir(path))

    def _do(self, name: str, action: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        counts = not self.only or name in self.only
        if counts:
            self.operations.append(name)
        if not counts or not self.at <= len(self.operations) < self.at + self.count:
            return action()
        if len(self.operations) == self.at:
            half()
        if self.kind == "crash":
            raise Crash
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
