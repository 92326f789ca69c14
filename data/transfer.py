"""Bytes from fsspec's file systems, whatever the network does meanwhile.

Each piece of a file is asked for again, with growing pauses, until the patience is at its end. A file counts
only when its size, what its server says it is (ETag, …) and, where they are known, its checksums agree.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from data.errors import DamagedData, UserError

PIECE = 2**24
"""Bytes asked for at a time."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_PACKAGES |= {"az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "hf": "huggingface_hub"}
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Remote:
    """A file that lies elsewhere."""

    url: str
    size: int | None = None
    """In bytes; None where the server does not say."""
    version: str = ""
    """What the server calls these bytes: an ETag, a generation, a time of change; empty where it says nothing."""
    sha256: str = ""
    """What our manifest says they are; empty for files made elsewhere."""

    @property
    def key(self) -> str:
        """Names exactly these bytes in the cache."""
        named = self.sha256 or hashlib.sha256(f"{self.url}\n{self.size}\n{self.version}".encode()).hexdigest()
        return named[:40]


class _Lost(Exception):
    """Worth another try; the message says what happened."""


class _NoRanges(Exception):
    """The server sends the whole file, whatever part is asked for."""


def patience() -> float:
    """Seconds without any progress after which a transfer is given up (`HEADWATER_PATIENCE`, 120 by default)."""
    text = os.environ.get("HEADWATER_PATIENCE", "120")
    try:
        return max(0.0, float(text))
    except ValueError:
        raise UserError(f"HEADWATER_PATIENCE={text} is no number of seconds") from None


def look_up(url: str) -> Remote:
    """Size and version of a file; raises `DamagedData` when it does not exist, `UserError` when out of reach."""
    return insisting(url, lambda: _look_up(url))


def _look_up(url: str) -> Remote:
    system = file_system(url)
    with translated(url):
        system.invalidate_cache()
        return _described(url, system.info(url))


def _described(url: str, info: dict[str, Any]) -> Remote:
    if info.get("type") == "directory":
        raise FileNotFoundError(url)
    names = ("ETag", "etag", "generation", "Last-Modified", "LastModified", "mtime", "last_modified", "created")
    version = next((f"{name}={info[name]}" for name in names if info.get(name)), "")
    return Remote(url, info.get("size"), version)


def read_small(url: str) -> bytes:
    """A whole small file, such as a manifest; errors as in `look_up`."""

    def read() -> bytes:
        system = file_system(url)
        with translated(url):
            system.invalidate_cache()
            return bytes(system.cat_file(url))

    return insisting(url, read)


def listed(url: str) -> list[str]:
    """The files behind a URL with `*`, `?` or `[…]`, or those in a folder whose URL ends with a slash; sorted."""

    def find() -> list[str]:
        system = file_system(url)
        with translated(url):
            system.invalidate_cache()
            pattern = url + "*" if url.endswith("/") else url
            return sorted(str(system.unstrip_protocol(name)) for name in system.glob(pattern))

    return insisting(url, find)


def download(remote: Remote, descriptor: int) -> None:
    """Bring a file to an open, empty (or preallocated) local one.

    Raises:
        DamagedData: it does not exist, or stays another file than `remote` describes.
        UserError: its server cannot be reached, refuses, or the local disk is full.
    """
    for _ in range(2):  # what a bad line spoiled comes right the second time
        insisting(remote.url, lambda: _attempt(remote, descriptor))
        if not remote.sha256 or _digest(descriptor) == remote.sha256:
            return
    raise DamagedData(f"{remote.url} does not hold the bytes that its manifest names; upload it again")


def _attempt(remote: Remote, descriptor: int) -> None:
    found = _look_up(remote.url)
    if remote.sha256 and remote.size is not None and found.size not in (None, remote.size):
        raise DamagedData(f"{remote.url} has {found.size} bytes, but {remote.size} in its manifest; upload it again")
    if not remote.sha256 and (found.size, found.version) != (remote.size, remote.version):
        raise DamagedData(f"{remote.url} has changed since it was indexed; start again, or restore it")
    os.ftruncate(descriptor, remote.size or 0)
    try:
        size = _in_pieces(found, descriptor)
    except _NoRanges:
        size = insisting(found.url, lambda: _in_one_go(found, descriptor))
    os.ftruncate(descriptor, size)
    if found.size is not None and size != found.size:
        raise _Lost(f"{size} of {found.size} bytes came")
    if not remote.sha256 and _look_up(remote.url) != found:
        raise _Lost("it changed while it was read")


def _in_pieces(found: Remote, descriptor: int) -> int:
    """Ranges one after the other; returns the bytes written."""
    if found.size is None:
        raise _NoRanges
    for start in range(0, found.size, PIECE):
        end = min(start + PIECE, found.size)

        def piece(start: int = start, end: int = end) -> None:
            _write(descriptor, _range(found.url, start, end), start)

        insisting(found.url, piece)
    return found.size


def _range(url: str, start: int, end: int) -> bytes:
    system = file_system(url)
    if not _is_http(url):
        with translated(url):
            payload = bytes(system.cat_file(url, start=start, end=end))
    else:
        sink = _Sink(end - start)
        headers = {**system.kwargs.get("headers", {}), "Range": f"bytes={start}-{end - 1}"}
        with translated(url):
            _stream(system, url, sink, headers=headers)
        payload = bytes(sink.payload)
    if len(payload) != end - start:
        raise _Lost(f"{len(payload)} bytes came where {end - start} were asked for")
    return payload


class _Sink:
    """Takes at most the bytes that were asked for."""

    def __init__(self, most: int) -> None:
        self.payload, self.most = bytearray(), most

    def write(self, chunk: bytes) -> int:
        """Raises `_NoRanges` when more than that come."""
        self.payload += chunk
        if len(self.payload) > self.most:
            raise _NoRanges
        return len(chunk)

    def read(self, size: int = -1) -> bytes:
        """Nothing; fsspec takes only what can be read for a file."""
        return b""

    def tell(self) -> int:
        """Nothing of use."""
        return 0

    def close(self) -> None:
        """Nothing."""


class _File(_Sink):
    """Passes bytes on to a descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self.written = descriptor, 0

    def write(self, chunk: bytes) -> int:
        """See the other one."""
        _write(self.descriptor, chunk, self.written)
        self.written += len(chunk)
        return len(chunk)


def _in_one_go(found: Remote, descriptor: int) -> int:
    system, file = file_system(found.url), _File(descriptor)
    with translated(found.url):
        if _is_http(found.url):
            _stream(system, found.url, file)
        else:
            with system.open(found.url, "rb") as source:
                while chunk := source.read(PIECE):
                    file.write(chunk)
    return file.written


def _stream(system: Any, url: str, sink: _Sink, **arguments: Any) -> None:
    from fsspec.asyn import sync

    sync(system.loop, system._get_file, url, sink, chunk_size=2**20, **arguments)


def _write(descriptor: int, payload: bytes, at: int) -> None:
    view = memoryview(payload)
    try:
        while view:
            written = os.pwrite(descriptor, view, at)
            view, at = view[written:], at + written
    except OSError as error:
        raise UserError(f"cannot write to the cache: {error.strerror}; make room, or set HEADWATER_CACHE") from None


def _digest(descriptor: int) -> str:
    with open(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def insisting(url: str, action: Callable[[], _Value]) -> _Value:
    """`action()`, again after each `_Lost` with pauses that double, until the patience is at its end."""
    began, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        try:
            return action()
        except _Lost as lost:
            if time.monotonic() - began + pause > patience():
                raise UserError(
                    f"{url} could not be fetched within {patience():.0f} s (HEADWATER_PATIENCE): {lost}"
                ) from None
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, _LONGEST_PAUSE)


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Errors of fsspec and what it stands on: missing, refused, or worth another try."""
    try:
        yield
    except (UserError, _Lost, _NoRanges):
        raise
    except FileNotFoundError as error:
        status = getattr(error.__cause__, "status", 404)  # over HTTP anything that fails is "not found"
        if error.__cause__ is not None and status not in (404, 410):
            if status in (401, 403):
                raise UserError(f"{url} may not be read (HTTP {status}); check your credentials") from None
            raise _Lost(_short(error.__cause__)) from None
        raise DamagedData(f"{url} does not exist; check its name, or restore it") from None
    except PermissionError as error:
        raise UserError(f"{url} may not be read: {_short(error)}; check your credentials") from None
    except Exception as error:
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "HttpError401"):
            raise UserError(f"{url}: {_short(error)}; give credentials, or anon=true (FSSPEC_S3_ANON)") from None
        if getattr(error, "status", None) in (401, 403):
            raise UserError(f"{url} may not be read: {_short(error)}; check your credentials") from None
        raise _Lost(_short(error)) from None


def _short(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def file_system(url: str) -> Any:
    """fsspec's file system for a URL, set up by its own configuration (`FSSPEC_S3_ENDPOINT_URL`, …).

    Raises `UserError` for a kind that fsspec does not know, or whose package is not installed.
    """
    import fsspec

    protocol = url.partition("://")[0].lower()
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp

        stall = max(1.0, min(30.0, patience()))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=stall, sock_read=stall)
        options["client_kwargs"] = fsspec.config.conf.get(protocol, {}).get("client_kwargs", {}) | {"timeout": timeout}
    try:
        return fsspec.filesystem(protocol, **options)
    except ImportError:
        package = _PACKAGES.get(protocol, f"the fsspec package for {protocol}")
        raise UserError(f"{url} needs {package}; install it (pip install {package})") from None
    except ValueError as error:
        raise UserError(f"{url} is of a kind that fsspec does not read: {_short(error)}") from None
