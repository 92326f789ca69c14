"""Writing a dataset: WebDataset tars, an index beside each, and a manifest that names them all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data.errors import UserError
from data.files import sync, write_atomically
from data.shard_file import ShardFile

MANIFEST = "dataset.json"
FORMAT = 1
_HOST = socket.gethostname().replace("/", "_").replace(".", "_")


def fingerprint(shards: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """What a dataset *is*: a hash of its shards' names, counts and sizes, and of the fields that shape samples."""
    facts = [[shard["name"], shard["samples"], shard["bytes"]] for shard in shards]
    return hashlib.sha256(json.dumps([facts, about], sort_keys=True).encode()).hexdigest()


class DatasetWriter:
    """Writes shards into a hidden folder beside `out` and renames it to `out` when all is well.

        with DatasetWriter(Path("shards"), "images", samples_per_shard=10_000) as writer:
            writer.add("cat/001", {"jpg": payload}, label=0)

    A key may hold slashes but no dot in its last part (WebDataset ends the key there) and must be unique.
    Until the block ends everything lies in `folder`, the hidden one; more may be put there.
    """

    def __init__(self, out: Path, kind: str, samples_per_shard: int, overwrite: bool = False) -> None:
        """Raises `UserError` when `out` exists (and is no dataset, or `overwrite` is off), its parent cannot be
        written, or a shard would hold nothing."""
        if samples_per_shard < 1:
            raise UserError(f"a shard cannot hold {samples_per_shard} samples; give a size of at least 1")
        out = Path(os.path.abspath(out))
        check_free(out, overwrite)
        self.out, self.kind, self.samples_per_shard = out, kind, samples_per_shard
        self.extra: dict[str, Any] = {}
        self.folder = out.parent / f".{out.name}.{_HOST}.{os.getpid()}.partial"
        self._shards: list[dict[str, Any]] = []
        self._seen: set[bytes] = set()
        self._shard: ShardFile | None = None
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(out)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        except OSError as error:
            raise UserError(f"cannot write beside {out}: {error.strerror}; choose a folder you own") from None

    def add(self, key: str, parts: dict[str, bytes], label: int = -1) -> None:
        """Append one sample: `parts` maps extensions (`jpg`, `npy`) to bytes.

        Raises `ValueError` for a key that is taken or malformed, `UserError` when the disk is full.
        """
        self._claim(key)
        with self._writing():
            self._append(key, parts, label)

    def _append(self, key: str, parts: dict[str, bytes], label: int) -> None:
        if self._shard is None:
            self._shard = ShardFile(self.folder / shard_name(len(self._shards)))
        self._shard.add(key, parts, label)
        if len(self._shard) >= self.samples_per_shard:
            self.close_shard()

    def adopt(self, entries: list[dict[str, Any]]) -> None:
        """Take in shards that others wrote into `folder`, by their entries."""
        self._shards += entries

    def close_shard(self, **facts: Any) -> None:
        """End the current shard, noting `facts` in its manifest entry; nothing if it is empty."""
        if self._shard is not None:
            with self._writing():
                self._shards.append(self._shard.close(**facts))
                self._shard = None

    def copy_file(self, name: str, payload: bytes) -> None:
        """Put a side file, such as a tokenizer, into the dataset's folder."""
        with self._writing():
            write_atomically(self.folder / name, payload)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:  # after _finish there is nothing left under this name
            self._drop()

    def _finish(self) -> None:
        self.close_shard()
        if not self._shards:
            raise UserError(f"nothing to write to {self.out}: no usable sample was found")
        with self._writing():
            write_manifest(self.folder, self.kind, self.extra, self._shards)
            old = self.folder.with_suffix(".old")
            if self.out.exists():
                os.replace(self.out, old)
            try:
                os.replace(self.folder, self.out)
            except OSError:
                if old.exists():
                    os.replace(old, self.out)
                raise
            sync(self.out.parent)
            shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A full disk, or one that went away, is a fact about the disk."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write {self.out}: {error.strerror or error}; make room or choose another disk"
            ) from None

    def _drop(self) -> None:
        """Forget the open shard and the hidden folder."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _claim(self, key: str) -> None:
        if "." in key.rpartition("/")[2] or "\n" in key or not key:
            raise ValueError(f"key {key!r} must be non-empty, without line breaks and without a dot in its base name")
        short = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=12).digest()
        if short in self._seen:
            raise ValueError(f"key {key!r} was added twice")
        self._seen.add(short)


def shard_name(number: int) -> str:
    """The file name of a dataset's shard."""
    return f"shard-{number:06d}.tar"


def write_manifest(folder: Path, kind: str, about: dict[str, Any], shards: list[dict[str, Any]], **notes: Any) -> None:
    """Make the shards in `folder` a dataset.

    `about` are the fields that say what it is (see `fingerprint`), `notes` others, about how it came to be.
    """
    facts = {"kind": kind} | about
    manifest = {"format": FORMAT, "fingerprint": fingerprint(shards, facts)} | facts | notes | {"shards": shards}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse to replace what is there, unless it is a dataset and the user said so."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{out} already exists; remove it, choose another folder, or pass --overwrite")
    if not (out / MANIFEST).is_file():
        raise UserError(f"{out} exists and is no dataset ({MANIFEST} is not in it), so it is not overwritten")


def _remove_leftovers(out: Path) -> None:
    """Remove hidden folders that killed processes of this machine left beside `out`."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.{glob.escape(_HOST)}.*"):
        process, kind = folder.name.split(".")[-2:]
        # What was replaced (`old`) is the only copy as long as there is no new one.
        superfluous = kind == "partial" or (kind == "old" and out.exists())
        if superfluous and process.isdecimal() and not _alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
