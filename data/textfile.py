"""One file of text, compressed or not, read front to back."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import zstandard

from data.errors import UserError

COMPRESSED = (".gz", ".zst")
_BUFFER = 2**20
_COMPRESSED_BLOCK = 2**14


class TextFile:
    """Lines and blocks of a file's (decompressed) bytes, and how far into the file on disk they reach."""

    def __init__(self, path: Path) -> None:
        """Raises `UserError` when the file cannot be opened."""
        self.path = path
        with self._reading():
            self._raw = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        self._file: IO[bytes] = self._raw
        suffix = path.suffix.lower()
        if suffix == ".gz":
            self._file = io.BufferedReader(gzip.GzipFile(fileobj=self._raw), _BUFFER)
        elif suffix == ".zst":
            self._file = io.BufferedReader(_Zstandard(self._raw), _BUFFER)

    @property
    def position(self) -> int:
        """Bytes read from the file on disk."""
        return self._raw.tell()

    def read(self, most: int) -> bytes:
        """The next bytes, at most so many; none at the end."""
        with self._reading():
            return self._file.read(most)

    def __iter__(self) -> Iterator[bytes]:
        """Its lines, with their ends."""
        while True:
            with self._reading():
                line = self._file.readline()
            if not line:
                return
            yield line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{self.path} is damaged or cut off ({error}); copy it again") from None
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from None


class _Zstandard(io.RawIOBase):
    """The content of a file of one or more frames; unlike zstandard's reader it notices a frame that is cut off."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame: Any = None
        self._ready, self._left = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._left or self._raw.read(_COMPRESSED_BLOCK)
            if not block:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._ready = self._frame.decompress(block)
            self._left = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
