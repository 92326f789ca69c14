"""The places of the files inside a tar, read from its headers alone.

Understands ustar (with its name prefix), GNU long names and base-256 sizes, and pax `path` and `size`
records. Directories, links and devices are passed over. Nothing is extracted; names are opaque.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data.errors import UserError

BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_BYTES = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices and folders: nothing follows their header, whatever size it names (`tarfile`'s rule)."""
_LONGEST_NAME = 1 << 20
"""A long name or pax record beyond this many bytes is taken for damage."""


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int
    """Where its bytes begin in the tar."""
    size: int
    """How many there are."""


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
        total = os.fstat(file.fileno()).st_size
        if file.read(2) == b"\x1f\x8b":
            raise UserError(f"{path} is gzip-compressed, which allows no random access; gunzip it first")
        position, name, size = 0, None, None
        while position + BLOCK <= total:
            file.seek(position)
            header = file.read(BLOCK)
            if header == bytes(BLOCK):
                return
            _check(header, path, position)
            kind, length = header[156:157], _number(header[124:136], path, position)
            start = position + BLOCK
            if kind in (b"x", b"X", b"L", b"g", b"K") and length > _LONGEST_NAME:
                raise UserError(f"{path} has a {length}-byte name record at byte {position}; it looks damaged")
            if kind in (b"x", b"X"):
                records = _pax(file.read(length))
                name = records.get("path", name)
                size = int(records["size"]) if records.get("size", "").isdecimal() else size
            elif kind == b"L":
                name = file.read(length).split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind not in (b"g", b"K"):
                length = 0 if kind in _WITHOUT_BYTES else length if size is None else size
                if start + length > total:
                    raise UserError(f"{path} is cut off: the member at byte {position} runs past its end")
                if kind in _REGULAR:
                    yield Member(name if name is not None else _name(header), start, length)
                name, size = None, None
            position = start + -(-length // BLOCK) * BLOCK
        if position != total or total == 0:
            raise UserError(f"{path} is cut off after {total} bytes; copy it again")


def _check(header: bytes, path: Path, position: int) -> None:
    stored = header[148:156].split(b"\0")[0].strip()
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    try:
        good = int(stored, 8) == total
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{path} is not a tar or is damaged: bad header checksum at byte {position}")


def _number(field: bytes, path: Path, position: int) -> int:
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    try:
        return int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise UserError(f"{path} has an unreadable size in the header at byte {position}") from None


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    if header[257:262] == b"ustar" and header[257:265] != b"ustar  \0":
        prefix = header[345:500].split(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def _pax(body: bytes) -> dict[str, str]:
    """`length key=value\\n` records; a damaged one ends the list."""
    records, position = {}, 0
    while position < len(body):
        digits, space, _ = body[position : position + 20].partition(b" ")
        if not space or not digits.isdigit() or not (0 < int(digits) <= len(body) - position):
            break
        key, _, value = body[position + len(digits) + 1 : position + int(digits) - 1].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        position += int(digits)
    return records
