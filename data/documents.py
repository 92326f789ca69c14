"""Files and folders of text -> documents, in pieces of bounded size."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from data.errors import UserError
from data.textfile import COMPRESSED, TextFile

DocumentUnit = Literal["file", "line", "paragraph"]
JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".parquet",)
PIECE = 2**22
"""Characters of a document from which on it is handed over in pieces."""
_NAMES = (
    "txt text md markdown rst tex org adoc html xml csv tsv json yaml yml toml ini cfg py pyi c h cc cpp "
    "hpp cu rs go java kt scala js jsx ts tsx css rb php pl lua r jl hs ml swift cs sh sql srt vtt log"
)
TEXT_SUFFIXES = frozenset("." + name for name in _NAMES.split())
"""What counts as text inside a folder; a file named outright is read whatever its suffix."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_WORD_END = re.compile(r"(?<=\S)(?=[ \n])")
_ROWS = 1024


@dataclass
class ReadCounts:
    """What reading came across; filled in while the documents are consumed."""

    bytes_read: int = 0
    """Bytes of the files, as they lie on disk, read so far."""
    replaced: int = 0
    """Undecodable pieces that became U+FFFD."""
    empty: int = 0
    """Documents without any text, left out."""


def find_text(sources: Sequence[str | Path]) -> list[Path]:
    """The files behind `sources`: files as named, folders walked recursively in sorted order.

    Hidden files and folders are passed over. Raises `UserError` for a source that does not exist, a folder
    without text files, or no sources at all.
    """
    if not sources:
        raise UserError("no text was named; give files (.txt, .jsonl, …) or folders that hold them")
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = _walk(source)
            if not inside:
                raise UserError(f"the folder {source} holds no text files (.txt, .md, .py, .jsonl, …)")
            found += inside
        elif source.is_file():
            found.append(source)
        else:
            raise UserError(f"{source} does not exist; give text files or folders that hold them")
    return found


class Piece(NamedTuple):
    """A document, or a piece of a long one, cut where a word ends."""

    text: str
    first: bool
    last: bool


def read_documents(
    sources: Sequence[str | Path],
    document: DocumentUnit = "file",
    field: str = "text",
    counts: ReadCounts | None = None,
    advance: Callable[[int], object] | None = None,
) -> Iterator[str]:
    """Each document of `sources` in turn, whole; see `read_pieces`."""
    held: list[str] = []
    for piece in read_pieces(sources, document, field, counts, advance):
        held.append(piece.text)
        if piece.last:
            yield "".join(held)
            held = []


def read_pieces(
    sources: Sequence[str | Path],
    document: DocumentUnit = "file",
    field: str = "text",
    counts: ReadCounts | None = None,
    advance: Callable[[int], object] | None = None,
) -> Iterator[Piece]:
    """Each document of `sources` in turn, the long ones in pieces of about `PIECE` characters.

    A text file is one document, or one a `line`, or one a `paragraph` (split at blank lines). A line of a
    JSONL file and a row of a parquet file is always one document: the string under `field`. All but parquet may
    be compressed (.gz, .zst). Bytes that are not UTF-8 become U+FFFD and are counted, documents of white space
    alone are left out and counted; `advance` hears the bytes of input read. Memory holds one piece, line or group
    of rows. Raises `UserError` for missing, empty or damaged sources, broken JSON or a missing field.
    """
    counts = counts if counts is not None else ReadCounts()
    found = False
    for path in find_text(sources):
        read = 0
        for piece, position in _pieces(path, document, field, counts):
            counts.bytes_read += position - read
            if advance is not None:
                advance(position - read)
            read = position
            if piece.text.strip() or not (piece.first and piece.last):
                found = True
                yield piece
            elif position:
                counts.empty += 1
    if not found:
        raise UserError(f"{', '.join(map(str, sources))}: no text in there; every file or line is empty")


def _walk(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            suffix = _kind(Path(name))
            if not name.startswith(".") and (suffix in TEXT_SUFFIXES or suffix in JSON_LINES + TABLES):
                found.append(Path(parent, name))
    return found


def _kind(path: Path) -> str:
    """The suffix that tells what a file holds, below that of its compression."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def _pieces(path: Path, document: DocumentUnit, field: str, counts: ReadCounts) -> Iterator[tuple[Piece, int]]:
    """Pieces of one file, and how many of its bytes on disk have been read by then."""
    kind = _kind(path)
    if kind in TABLES:
        yield from _rows(path, field, counts)
        return
    with TextFile(path) as file:
        if kind in JSON_LINES:
            documents: Iterable[str] = _json_lines(file, path, field, counts)
        elif document == "line":
            documents = (_decode(raw.rstrip(b"\r\n"), counts) for raw in file)
        elif document == "paragraph":
            documents = _paragraphs(file, counts)
        else:
            for piece in _long(file, counts):
                yield piece, file.position
            return
        for text in documents:
            yield Piece(text, True, True), file.position


def _paragraphs(lines: Iterable[bytes], counts: ReadCounts) -> Iterator[str]:
    held: list[bytes] = []
    for line in lines:
        if line.strip(b" \t\r\n"):
            held.append(line)
        elif held:
            yield _decode(b"".join(held).rstrip(b"\r\n"), counts)
            held = []
    if held:
        yield _decode(b"".join(held).rstrip(b"\r\n"), counts)


def _long(file: TextFile, counts: ReadCounts) -> Iterator[Piece]:
    """One document, in pieces."""
    pending, first = "", True
    for text in _decoded(file, counts):
        pending += text
        while len(pending) > PIECE:
            cut = _WORD_END.search(pending, PIECE)
            if cut is None:
                break
            yield Piece(pending[: cut.start()], first, False)
            pending, first = pending[cut.start() :], False
    yield Piece(pending, first, True)


def _decoded(file: TextFile, counts: ReadCounts) -> Iterator[str]:
    """A file's text, block by block; a block ends at white space, where no character's bytes are torn apart."""
    held, encoding = b"", "utf-8-sig"
    while block := file.read(PIECE):
        held += block
        end = 1 + max(held.rfind(b"\n"), held.rfind(b" "))
        if end:
            yield _decode(held[:end], counts, encoding)
            held, encoding = held[end:], "utf-8"
    yield _decode(held, counts, encoding)


def _rows(path: Path, field: str, counts: ReadCounts) -> Iterator[tuple[Piece, int]]:
    """The strings in one column of a parquet file, a group of rows at a time."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"reading {path} needs pyarrow; pip install 'headwater[parquet]'") from None
    size, done = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as table:
            kind = table.schema_arrow.field(field).type if field in table.schema_arrow.names else None
            if kind is None or not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
                columns = ", ".join(table.schema_arrow.names)
                raise UserError(f"{path}: no strings in a column {field!r} (found: {columns}); name its field")
            total = max(1, table.metadata.num_rows)
            for group in table.iter_batches(batch_size=_ROWS, columns=[field]):
                for text in group.column(0).to_pylist():
                    done += 1
                    yield Piece(text or "", True, True), size * done // total
    except (arrow.ArrowInvalid, OSError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None


def _json_lines(lines: Iterable[bytes], path: Path, field: str, counts: ReadCounts) -> Iterator[str]:
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(_decode(raw, counts))
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise UserError(f"{path}, line {number}: not JSON ({reason}); one object a line is needed") from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            fields = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{path}, line {number}: no string under {field!r} (found: {fields}); name its field")
        # JSON may spell half a surrogate pair, which no UTF-8 text can hold.
        text, lone = _SURROGATES.subn("\ufffd", row[field])
        counts.replaced += lone
        yield text


def _decode(raw: bytes, counts: ReadCounts, encoding: str = "utf-8-sig") -> str:
    text = raw.decode(encoding, errors="replace")
    if "\ufffd" in text:
        counts.replaced += text.count("\ufffd") - raw.count("\ufffd".encode())
    return text
