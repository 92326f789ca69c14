"""Writing one shard: a WebDataset tar and its index."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.files import sha256, sync
from data.index import ShardIndex, checksum, join_keys
from data.tar import BLOCK


class ShardFile:
    """A tar at `path` with its index beside it; both appear, forced to disk, when it is closed."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` where it cannot be written."""
        from webdataset import TarWriter

        self.path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._samples: list[tuple[str, dict[str, tuple[int, int, int]], int]] = []
        self._stream = open(self._partial, "w+b")  # noqa: SIM115 - closed by close or abandon
        # mtime=0: a float would add a pax header of 1 KiB to every member, and today's date to the bytes.
        self._tar = TarWriter(self._stream, encoder=False, mtime=0, user="", group="", mode=0o644)

    def __len__(self) -> int:
        return len(self._samples)

    def add(self, key: str, parts: dict[str, bytes], label: int = -1) -> None:
        """Append one sample; see `DatasetWriter.add`."""
        places = {}
        for extension in sorted(parts):
            payload = parts[extension]
            self._tar.write({"__key__": key, extension: payload})
            # The payload is padded to whole blocks; what precedes it (one header, more for long names) varies.
            padded = -(-len(payload) // BLOCK) * BLOCK
            places[extension] = (self._tar.tarstream.offset - padded, len(payload), checksum(payload))
        self._samples.append((key, places, label))

    def close(self, **facts: Any) -> dict[str, Any]:
        """Finish both files and return the manifest's entry, with `facts` added."""
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        samples, size = self._samples, self._partial.stat().st_size
        parts = sorted({extension for _, places, _ in samples for extension in places})
        table = np.array([[places.get(p, (0, -1, 0)) for p in parts] for _, places, _ in samples], dtype=np.int64)
        index = self.path.with_suffix(".index")
        ShardIndex(
            parts=parts,
            offsets=table[:, :, 0],
            sizes=table[:, :, 1],
            labels=np.array([label for _, _, label in samples], dtype=np.int64),
            checksums=table[:, :, 2].astype(np.uint32),
            names=join_keys(key for key, _, _ in samples),
            tar_bytes=size,
        ).save(index)
        entry = {
            "name": self.path.name,
            "samples": len(samples),
            "bytes": size,
            "sha256": sha256(self._partial),
            "index_sha256": sha256(index),
        }
        os.replace(self._partial, self.path)
        sync(self.path.parent)
        return entry | facts

    def abandon(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):
            self._tar.close()
        with suppress(OSError):
            self._stream.close()
        with suppress(OSError):
            self._partial.unlink(missing_ok=True)
