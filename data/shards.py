"""Writing a dataset: WebDataset tars, an index beside each, and a manifest that names them all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from data.errors import UserError
from data.files import sha256, sync_folder, write_atomically
from data.index import ShardIndex, checksum
from data.tar import BLOCK

MANIFEST = "dataset.json"
FORMAT = 1


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
        """Raises `UserError` when `out` exists and `overwrite` is off, or its parent cannot be written."""
        if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} already exists; remove it, choose another folder, or pass --overwrite")
        self.out, self.kind, self.samples_per_shard = out, kind, samples_per_shard
        self.extra: dict[str, Any] = {}
        self.folder = out.parent / f".{out.name}.{os.getpid()}.partial"
        self._shards: list[dict[str, Any]] = []
        self._samples: list[tuple[str, dict[str, tuple[int, int, int]], int]] = []
        self._seen: set[bytes] = set()
        self._tar: Any = None
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir()
        except OSError as error:
            raise UserError(f"cannot write beside {out}: {error.strerror}; choose a folder you own") from None

    def add(self, key: str, parts: dict[str, bytes], label: int = -1) -> None:
        """Append one sample: `parts` maps extensions (`jpg`, `npy`) to bytes."""
        self._claim(key)
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
        if self._tar is None:
            return
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
            keys=[key for key, _, _ in samples],
            tar_bytes=path.stat().st_size,
        ).save(path.with_suffix(".index"))
        entry = {
            "name": path.name,
            "samples": len(samples),
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        self._shards.append(entry | facts)
        self._samples, self._tar = [], None

    def copy_file(self, name: str, payload: bytes) -> None:
        """Put a side file, such as a tokenizer, into the dataset's folder."""
        write_atomically(self.folder / name, payload)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._tar is not None:
                self._tar.close()
                self._stream.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        self._finish()

    def _finish(self) -> None:
        self.close_shard()
        if not self._shards:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(f"nothing to write to {self.out}: no usable sample was found")
        about = {"kind": self.kind} | self.extra
        manifest = {"format": FORMAT, "fingerprint": fingerprint(self._shards, about)} | about
        text = json.dumps(manifest | {"shards": self._shards}, indent=1, ensure_ascii=False)
        write_atomically(self.folder / MANIFEST, text)
        if self.out.exists():
            shutil.rmtree(self.out)
        os.replace(self.folder, self.out)
        sync_folder(self.out.parent)

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
