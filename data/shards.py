"""Writing a dataset: WebDataset tars, an index beside each, and a manifest that names them all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from data.errors import UserError
from data.files import sha256, sync, write_atomically
from data.index import ShardIndex, checksum, join_keys
from data.tar import BLOCK

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
        self._samples: list[tuple[str, dict[str, tuple[int, int, int]], int]] = []
        self._seen: set[bytes] = set()
        self._tar: Any = None
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
        if self._tar is None:
            self._open_shard()
        places = {}
        for extension in sorted(parts):
            payload = parts[extension]
            self._tar.write({"__key__": key, extension: payload})
            # The payload is padded to whole blocks; what precedes it (one header, more for long names) varies.
            padded = -(-len(payload) // BLOCK) * BLOCK
            places[extension] = (self._tar.tarstream.offset - padded, len(payload), checksum(payload))
        self._samples.append((key, places, label))
        if len(self._samples) >= self.samples_per_shard:
            self.close_shard()

    def close_shard(self, **facts: Any) -> None:
        """End the current shard, noting `facts` in its manifest entry; nothing if it is empty."""
        if self._tar is not None:
            with self._writing():
                self._close_shard(facts)

    def _close_shard(self, facts: dict[str, Any]) -> None:
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        path, samples = self._path, self._samples
        parts = sorted({extension for _, places, _ in samples for extension in places})
        table = np.array([[places.get(p, (0, -1, 0)) for p in parts] for _, places, _ in samples], dtype=np.int64)
        ShardIndex(
            parts=parts,
            offsets=table[:, :, 0],
            sizes=table[:, :, 1],
            labels=np.array([label for _, _, label in samples], dtype=np.int64),
            checksums=table[:, :, 2].astype(np.uint32),
            names=join_keys(key for key, _, _ in samples),
            tar_bytes=path.stat().st_size,
        ).save(path.with_suffix(".index"))
        entry = {
            "name": path.name,
            "samples": len(samples),
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
            "index_sha256": sha256(path.with_suffix(".index")),
        }
        self._shards.append(entry | facts)
        self._samples, self._tar = [], None

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
        about = {"kind": self.kind} | self.extra
        manifest = {"format": FORMAT, "fingerprint": fingerprint(self._shards, about)} | about
        text = json.dumps(manifest | {"shards": self._shards}, indent=1, ensure_ascii=False)
        with self._writing():
            write_atomically(self.folder / MANIFEST, text)
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
        if self._tar is not None:
            with suppress(OSError):
                self._tar.close()
            with suppress(OSError):
                self._stream.close()
            self._tar = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _claim(self, key: str) -> None:
        if "." in key.rpartition("/")[2] or "\n" in key or not key:
            raise ValueError(f"key {key!r} must be non-empty, without line breaks and without a dot in its base name")
        short = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=12).digest()
        if short in self._seen:
            raise ValueError(f"key {key!r} was added twice")
        self._seen.add(short)

    def _open_shard(self) -> None:
        from webdataset import TarWriter

        self._path = self.folder / f"shard-{len(self._shards):06d}.tar"
        self._stream = open(self._path, "w+b")  # noqa: SIM115 - closed by close_shard
        # mtime=0: a float would add a pax header of 1 KiB to every member, and today's date to the bytes.
        self._tar = TarWriter(self._stream, encoder=False, mtime=0, user="", group="", mode=0o644)


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
