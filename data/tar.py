"""The places of the files inside a tar, read from its headers alone.

Understands ustar (with its name prefix), GNU long names and base-256 sizes, and pax `path` and `size`
records. Directories, links and devices are passed over; sparse files are refused, since their bytes are not
stored as they are. Nothing is extracted; names are opaque. Python's `tarfile` is the measure: where both
accept a tar they list the same files, and what it guesses at is refused here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from data.errors import UserError

BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_BYTES = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices and folders: nothing follows their header, whatever size it names (`tarfile`'s rule)."""
_LONGEST_NAME = 1 << 20
"""A long name or pax record beyond this many bytes is taken for damage."""
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_DECIMAL = re.compile(rb"[0-9]{1,19}")
_LARGEST = 1 << 62
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int
    """Where its bytes begin in the tar."""
    size: int
    """How many there are."""


class JoinedTars(UserError):
    """Something follows a tar's end marker."""

    def __init__(self, sentence: str, rest: bytes) -> None:
        """`rest`: the bytes read, from the first block on that is not all zeros."""
        super().__init__(sentence)
        self.rest = rest


class Bytes(Protocol):
    """What a tar is read from; `seek` only ever goes forward."""

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes, fewer only at the end."""

    def seek(self, position: int, /) -> object:
        """Go on at an absolute position."""


def compression(head: bytes) -> str | None:
    """The compression that a file's first bytes announce, None for none that is known."""
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)


def members(path: Path) -> Iterator[Member]:
    """The regular files of an uncompressed tar, in order.

    Raises:
        UserError: the file cannot be read, is compressed, damaged, or ends too early.
    """
    try:
        file = open(path, "rb", buffering=1 << 16)  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    with file:
        kind = compression(file.read(6))
        if kind:
            raise UserError(
                f"{path} is {kind}-compressed, which allows no random access; convert it with "
                f"`headwater shard convert {path} OUT`"
            )
        try:
            yield from walk(file, os.fstat(file.fileno()).st_size, str(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None


def walk(file: Bytes, total: int | None, path: str) -> Iterator[Member]:
    """The regular files of the tar in `file`, of `total` bytes (None: known only at its end).

    Between two members the caller may seek to the first one's offset and read it. A tar must close with an
    end marker (a block of zeros, which every writer leaves) and nothing else: without one it may have been cut
    off between two members, with more behind it tars were joined.

    Raises:
        UserError: naming `path` and the place, when the tar is damaged or ends too early.
    """
    position, records = 0, _Records()
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise _cut_off(path, position, boundary=not header and position > 0)
        if header.count(0) == BLOCK:
            if records.pending:
                raise _cut_off(path, position)
            _only_zeros(file, path)
            return
        _check(header, path, position)
        kind, length = header[156:157], _number(header[124:136], path, position)
        start = position + BLOCK
        if kind in (b"x", b"X", b"L", b"g", b"K"):
            if length > _LONGEST_NAME:
                raise UserError(f"{path} has a {length}-byte name record at byte {position}; it looks damaged")
            padded = -(-length // BLOCK) * BLOCK
            body = file.read(padded)
            if len(body) < padded:
                raise _cut_off(path, position)
            if body[length:].strip(b"\0"):
                raise UserError(f"{path} has a record of the wrong length at byte {position}; it looks damaged")
            records.take(kind, body[:length], path, position)
        else:
            if kind == b"S" or records.sparse:
                raise UserError(f"{path} holds a sparse file at byte {position}; pack it again without --sparse")
            length = 0 if kind in _WITHOUT_BYTES else length if records.size is None else records.size
            if total is not None and start + length > total:
                raise UserError(f"{path} is cut off: the member at byte {position} runs past its end; copy it again")
            name = records.name if records.name is not None else _name(header)
            # Before POSIX a folder was a file whose name ends with a slash.
            if kind in _REGULAR and not (kind == b"\0" and name.endswith("/")):
                yield Member(name, start, length)
            records = _Records()
        position = start + -(-length // BLOCK) * BLOCK


class _Records:
    """What the records before a member say about it."""

    name: str | None = None
    size: int | None = None
    sparse = False
    pending = False

    def take(self, kind: bytes, body: bytes, path: str, position: int) -> None:
        """Remember one record."""
        self.pending = True
        if kind == b"L":
            self._once(self.name, path, position)
            self.name = body.split(b"\0")[0].decode("utf-8", "surrogateescape")
        elif kind != b"K":
            found = _pax(body, path, position)
            if kind == b"g" and any(key in ("path", "size") or key.startswith("GNU.sparse") for key in found):
                raise UserError(f"{path} gives all its files one name or size (byte {position}); pack it again")
            if "path" in found and kind != b"g":
                self._once(self.name, path, position)
                self.name = found["path"].rstrip("/")
            if "size" in found and kind != b"g":
                self._once(self.size, path, position)
                self.size = _size(found["size"], path, position)
            self.sparse = self.sparse or any(key.startswith("GNU.sparse") for key in found)

    def _once(self, value: object, path: str, position: int) -> None:
        if value is not None:
            raise UserError(f"{path} gives one file two names or sizes (byte {position}); it looks damaged")


def _cut_off(path: str, position: int, boundary: bool = False) -> UserError:
    if boundary:
        return UserError(
            f"{path} is cut off or unfinished: it ends at byte {position} without an end marker; copy it again, or "
            f"take the samples that it holds with `headwater shard convert --salvage {path} OUT`"
        )
    return UserError(f"{path} is cut off after {position} bytes; copy it again")


def _only_zeros(file: Bytes, path: str) -> None:
    while chunk := file.read(1 << 16):
        if chunk.count(0) != len(chunk):
            first = next(at for at in range(0, len(chunk), BLOCK) if chunk[at : at + BLOCK].strip(b"\0"))
            raise JoinedTars(
                f"{path} goes on behind its end marker, as joined tars do; write its samples anew with "
                f"`headwater shard convert --salvage {path} OUT`",
                chunk[first:],
            )


def _check(header: bytes, path: str, position: int) -> None:
    stored = _OCTAL.fullmatch(header[148:156].split(b"\0")[0])
    rest = header[:148] + header[156:]
    total = sum(rest) + 8 * 32
    # Some old writers summed signed bytes.
    accepted = (total, total - 256 * sum(byte > 127 for byte in rest))
    if stored is None or not stored[1] or int(stored[1], 8) not in accepted:
        raise UserError(f"{path} is not a tar or is damaged: bad header checksum at byte {position}")


def _number(field: bytes, path: str, position: int) -> int:
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        digits = _OCTAL.fullmatch(field.split(b"\0")[0])
        value = int(digits[1] or b"0", 8) if digits else _LARGEST
    if value >= _LARGEST:
        raise UserError(f"{path} has an unreadable size in the header at byte {position}; it looks damaged")
    return value


def _size(text: str, path: str, position: int) -> int:
    raw = text.encode("utf-8", "surrogateescape")
    if not _DECIMAL.fullmatch(raw) or int(raw) >= _LARGEST:
        raise UserError(f"{path} has an unreadable size in the record at byte {position}; it looks damaged")
    return int(raw)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    if header[257:262] == b"ustar" and header[257:265] != b"ustar  \0":
        prefix = header[345:500].split(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def _pax(body: bytes, path: str, position: int) -> dict[str, str]:
    """`length key=value\\n` records (POSIX.1-2001, pax extended header); zeros end them."""
    records, at = {}, 0
    while at < len(body) and body[at]:
        digits, space, _ = body[at : at + 20].partition(b" ")
        length = int(digits) if space and _DECIMAL.fullmatch(digits) else 0
        key, equals, value = body[at + len(digits) + 1 : at + length].partition(b"=")
        if not (len(digits) + 3 < length <= len(body) - at) or not equals or not key or not value.endswith(b"\n"):
            raise UserError(f"{path} has a damaged record at byte {position}; copy it again")
        records[key.decode("utf-8", "surrogateescape")] = value[:-1].decode("utf-8", "surrogateescape")
        at += length
    return records
