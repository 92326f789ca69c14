"""Tars made elsewhere (also compressed, joined, cut off) -> shards of ours."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from data.errors import UserError
from data.images import UnreadableImage, verify
from data.index import IMAGE_PARTS, class_number, split_name
from data.patterns import is_url
from data.shards import DatasetWriter, check_free
from data.source import find_tars
from data.tar import JoinedTars, compression, walk

KEPT_PARTS = frozenset((*IMAGE_PARTS, "cls", "txt", "caption", "json"))
"""What a part's name may end with; others (pickles, programs, …) are left out and counted."""
_ENDS = (EOFError, gzip.BadGzipFile, lzma.LZMAError, OSError)
"""What decompressing damaged files raises (zlib.error apart)."""


@dataclass
class Conversion:
    """What came of it."""

    samples: int = 0
    shards: int = 0
    without_picture: int = 0
    """Samples left out for want of a picture."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    """(sample, reason) pairs of pictures that cannot be decoded, left out."""
    other_parts: dict[str, int] = field(default_factory=dict)
    """How many parts of each kind that we do not keep."""
    renamed: int = 0
    """Samples whose key another one had before."""
    damaged: list[str] = field(default_factory=list)
    """With `salvage`: what ended the reading of a tar."""


@dataclass(frozen=True)
class Reading:
    """How foreign tars are read."""

    salvage: bool = False
    """Take the samples before a damage, and those behind an end marker, instead of stopping.

    The last sample before a damage stays out, since nothing tells whether it is whole.
    """
    last_dot: bool = False
    """Keys end at the last dot of the name, not at the first as in WebDataset."""


def convert(
    sources: Sequence[str],
    out: Path,
    reading: Reading | None = None,
    *,
    samples_per_shard: int = 10_000,
    overwrite: bool = False,
    progress: bool = True,
) -> Conversion:
    """Write the picture samples of `sources` (tars, folders, patterns; gzip, bzip2, xz and zstd too) to `out`.

    Order is kept, class numbers (`cls`) go into the index, captions and JSON stay beside their picture. One sample
    is in memory at a time, and nothing is written but `out`, which appears when all is well. Names inside the tars
    are keys, never paths.

    Raises:
        UserError: a source is missing or, without `salvage`, damaged; `out` exists.
    """
    check_free(out, overwrite)
    reading, done, seen = reading or Reading(), Conversion(), set[str]()
    tars = [tar for source in sources for tar in find_tars(source, packed=True)]
    with DatasetWriter(out, "images", samples_per_shard, overwrite) as writer:
        for tar in tqdm(tars, desc="converting", unit="tar", disable=None if progress else True):
            for key, parts in _samples(tar, reading, done):
                _add(writer, tar, _fresh(key, seen, done), parts, done)
        if done.samples == 0:
            raise UserError(f"no sample of {tars[0]}{' and others' * (len(tars) > 1)} holds a picture")
    done.shards = -(-done.samples // samples_per_shard)
    return done


def _add(writer: DatasetWriter, tar: str, key: str, parts: dict[str, bytes], done: Conversion) -> None:
    label = _label(tar, key, parts.pop("cls", None))
    pictures = [name for name in parts if name in IMAGE_PARTS] or [
        name for name in parts if name.rpartition(".")[2] in IMAGE_PARTS
    ]
    if not pictures:
        done.without_picture += 1
        return
    if pictures[0] not in IMAGE_PARTS:
        parts[pictures[0].rpartition(".")[2]] = parts.pop(pictures[0])
    try:
        for name in parts:
            if name in IMAGE_PARTS:
                verify(parts[name])
    except UnreadableImage as error:
        done.unreadable.append((key, str(error)))
        return
    writer.add(key, parts, label)
    done.samples += 1


def _fresh(key: str, seen: set[str], done: Conversion) -> str:
    """The key, or one made from it where it is taken."""
    if key in seen:
        done.renamed += 1
        number = 2
        while f"{key}~{number}" in seen:
            number += 1
        key = f"{key}~{number}"
    seen.add(key)
    return key


def _label(tar: str, key: str, text: bytes | None) -> int:
    return -1 if text is None else class_number(text, tar, key)


def _samples(tar: str, reading: Reading, done: Conversion) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and parts of each sample; with salvage, of each that is whole."""
    key, parts = "", dict[str, bytes]()
    try:
        for name, payload in _files(tar, reading):
            new, extension = split_name(name, reading.last_dot)
            new = new.rpartition("/")[0] + "/" * ("/" in new) + new.rpartition("/")[2].replace(".", "_")
            if not extension:
                continue
            if new != key and parts:
                yield key, parts
                parts = {}
            key = new
            if extension.rpartition(".")[2] not in KEPT_PARTS:
                done.other_parts[extension] = done.other_parts.get(extension, 0) + 1
            elif extension in parts and not reading.salvage:
                raise UserError(f"{tar}: sample {key!r} has two parts {extension!r}; rename one, or pass --salvage")
            else:
                parts.setdefault(extension, payload)
    except UserError as error:
        if not reading.salvage:
            raise
        done.damaged.append(str(error))
        return  # the sample at hand may lack parts
    if parts:
        yield key, parts


def _files(tar: str, reading: Reading) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each regular file, in one pass over the decompressed bytes."""
    with ExitStack() as stack:
        raw = stack.enter_context(_open(tar))
        stream = _Forward(_decompressed(tar, raw, stack), tar)
        while True:
            try:
                for member in walk(stream, None, tar):
                    stream.seek(member.offset)
                    payload = stream.read(member.size)
                    if len(payload) < member.size:
                        raise UserError(f"{tar} is cut off: the member at byte {member.offset} runs past its end")
                    yield member.name, payload
                return
            except JoinedTars as joined:
                if not reading.salvage:
                    raise
                stream = stream.going_on(joined.rest)


class _Forward:
    """A stream that `walk` can read: seeking skips, and only ever goes forward."""

    def __init__(self, stream: IO[bytes], tar: str, begun: bytes = b"") -> None:
        self.stream, self.tar, self.position = stream, tar, 0
        self._begun = begun

    def read(self, size: int, /) -> bytes:
        """See `data.tar.Bytes`."""
        import zlib

        taken, self._begun = self._begun[:size], self._begun[size:]
        try:
            while len(taken) < size:
                more = self.stream.read(size - len(taken))
                if not more:
                    break
                taken += more
        except (*_ENDS, zlib.error) as error:
            raise UserError(f"{self.tar} is damaged or cut off: {error or type(error).__name__}") from None
        self.position += len(taken)
        return taken

    def seek(self, position: int, /) -> None:
        """See `data.tar.Bytes`."""
        while self.position < position:
            if not self.read(min(position - self.position, 1 << 20)):
                return

    def going_on(self, begun: bytes) -> _Forward:
        """A stream that begins with `begun` and goes on where this one stands."""
        return _Forward(self.stream, self.tar, begun)


def _open(tar: str) -> IO[bytes]:
    if is_url(tar):
        return _fetched(tar)
    try:
        return open(Path(tar).expanduser(), "rb")
    except OSError as error:
        raise UserError(f"cannot read {tar}: {error.strerror}") from None


def _fetched(url: str) -> IO[bytes]:
    """A remote tar, out of the cache."""
    from data.remote import way_to

    way = way_to(url)
    (remote,) = way.look_up([url])
    while (descriptor := way.cache.open(remote.key)) is None:
        way.fetch(remote)
    return os.fdopen(descriptor, "rb")


def _decompressed(tar: str, raw: IO[bytes], stack: ExitStack) -> Any:
    head = raw.read(6)
    kind = compression(head)
    whole: Any = io.BufferedReader(_Prefixed(head, raw), 1 << 20)
    if kind == "gzip":
        return stack.enter_context(gzip.GzipFile(fileobj=whole))
    if kind == "bzip2":
        return stack.enter_context(bz2.BZ2File(whole))
    if kind == "xz":
        return stack.enter_context(lzma.LZMAFile(whole))
    if kind == "zstd":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{tar} is zstd-compressed; install zstandard (pip install zstandard)") from None
        return zstandard.ZstdDecompressor().stream_reader(whole, read_across_frames=True)
    return whole


class _Prefixed(io.RawIOBase):
    """A stream with the bytes that were read from it put back."""

    def __init__(self, head: bytes, stream: IO[bytes]) -> None:
        self.head, self.stream = head, stream

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        taken = self.head[: len(buffer)] or self.stream.read(len(buffer))
        self.head = self.head[len(taken) :] if self.head else b""
        buffer[: len(taken)] = taken
        return len(taken)
