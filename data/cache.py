"""A bounded folder of downloaded files, shared by the processes of one machine, that no crash can spoil.

- A file appears under its key by a rename, whole and forced to disk; its key says which bytes it holds.
- Whoever reads a file holds a shared lock on it (`flock`, which dies with its holder); files in use stay.
- Whoever writes one holds an exclusive lock on its temporary; a temporary that can be locked was left behind
  by a process that died, and is removed.
- What was used longest ago goes first. Sizes count from the moment a download begins.

Keys are made by us from hashes: nothing that a server or a tar says ever becomes a path.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from data.errors import UserError
from data.files import sync

_KEY = re.compile(r"[0-9a-f]{16,64}")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


Keep = Callable[[str], bool]


def _nothing(key: str) -> bool:
    return False


class Full(Exception):
    """No room can be made: all that could go is in use."""


class Cache:
    """Files of at most `limit` bytes together in `folder`."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Makes the folder; raises `UserError` when that is not possible."""
        self.folder, self.limit = folder, limit
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the cache {folder}: {error.strerror}; set HEADWATER_CACHE") from None

    def path(self, key: str) -> Path:
        """Where the file of `key` lies, if it is there."""
        assert _KEY.fullmatch(key), key
        return self.folder / key

    def open(self, key: str) -> int | None:
        """A descriptor that keeps the file from being removed until it is closed; None when it is not there."""
        while True:
            try:
                descriptor = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink:
                with suppress(OSError):
                    os.utime(descriptor)
                return descriptor
            os.close(descriptor)  # removed between the two calls

    @contextmanager
    def writing(self, key: str, size: int | None, keep: Keep = _nothing, strict: bool = False) -> Iterator[int | None]:
        """A descriptor to write the file of `key` to, which is in place when the block ends well.

        Gives None where another process has brought it, or is bringing it, meanwhile.

        Raises:
            Full: no room for `size` bytes (None: unknown, so nothing is set aside). See `make_room`.
        """
        final, temporary = self.path(key), self.folder / f"{key}.partial"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _lock(descriptor) or not _same(descriptor, temporary):
                yield None
                return
            try:
                if final.exists():
                    yield None
                    return
                os.ftruncate(descriptor, 0)
                self.make_room(size or 0, keep, strict, descriptor)
                yield descriptor
                os.fsync(descriptor)
                os.replace(temporary, final)
                sync(self.folder)
            finally:
                temporary.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    def make_room(self, size: int, keep: Keep = _nothing, strict: bool = False, descriptor: int | None = None) -> None:
        """Remove files, the one used longest ago first, until `size` more bytes fit; set them aside.

        Those that `keep` names go last (`strict`: never), those in use never. The empty file behind `descriptor`
        grows to `size`, so that others count it. Raises `Full` when not enough can go.
        """
        with self._alone(), ExitStack() as held:
            files = self._files()
            free, going = self.limit - sum(stat.st_size for stat in files.values()), []
            for name in sorted(files, key=lambda name: (keep(name), files[name].st_mtime_ns)):
                if free >= size or (strict and keep(name)):
                    break
                if self._claimed(self.folder / name, held):
                    free += files[name].st_size
                    going.append(self.folder / name)
            if free < size:
                raise Full  # before anything has gone in vain
            for path in going:
                path.unlink(missing_ok=True)
            if descriptor is not None:
                os.ftruncate(descriptor, size)

    def clear_leftovers(self) -> None:
        """Remove the temporaries of processes that died."""
        with self._alone(), ExitStack() as held:
            for path in self.folder.glob("*.partial"):
                if self._claimed(path, held):
                    path.unlink(missing_ok=True)

    def used(self) -> int:
        """Bytes that files and downloads take."""
        return sum(stat.st_size for stat in self._files().values())

    def _files(self) -> dict[str, os.stat_result]:
        found = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _KEY.fullmatch(entry.name.removesuffix(".partial")):
                    with suppress(FileNotFoundError):
                        found[entry.name] = entry.stat(follow_symlinks=False)
        return found

    def _claimed(self, path: Path, held: ExitStack) -> bool:
        """Whether nobody reads or writes the file, nor can until `held` closes."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        held.callback(os.close, descriptor)
        return _lock(descriptor) and _same(descriptor, path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time counts and removes."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def cache_from_environment() -> Cache:
    """The machine's cache: `HEADWATER_CACHE` (a folder on a local disk) of `HEADWATER_CACHE_SIZE` (such as 200G).

    By default in the user's cache folder, with at most half of what is free there. Raises `UserError` for a size
    that is none.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headwater" / "shards"
    folder = Path(os.environ.get("HEADWATER_CACHE", home)).expanduser()
    cache = Cache(folder, 0)
    text = os.environ.get("HEADWATER_CACHE_SIZE", "")
    if text:
        cache.limit = parse_size(text)
    else:
        disk = os.statvfs(folder)
        cache.limit = (disk.f_bavail * disk.f_frsize + cache.used()) // 2
    return cache


def parse_size(text: str) -> int:
    """`500M`, `1.5T` or a number of bytes; raises `UserError` for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(?:i?B)?", text.strip().upper().replace("IB", "B"))
    if not found or not float(found[1]):
        raise UserError(f"HEADWATER_CACHE_SIZE={text} is no size; write bytes, or a number with K, M, G or T")
    return int(float(found[1]) * _UNITS[found[2]])


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
