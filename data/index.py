"""One shard's index: where each sample's parts lie, its label, its checksum, its key.

Stored beside the tar as a safetensors file, so that reading one runs no code and can map the arrays.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data.errors import UserError
from data.files import write_atomically
from data.tar import members

IMAGE_PARTS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
FORMAT = 1


@dataclass
class ShardIndex:
    """Of one shard with `n` samples and `p` kinds of parts."""

    parts: list[str]
    """The parts' extensions, such as `jpg`, `cls`, `npy`."""
    offsets: NDArray[np.int64]
    """(n, p): first byte of each part in the tar."""
    sizes: NDArray[np.int64]
    """(n, p): bytes of each part, -1 where a sample has none."""
    labels: NDArray[np.int64]
    """(n,): class number, -1 without one."""
    checksums: NDArray[np.uint32]
    """(n, p) CRC-32 of each part's bytes; (0, p) for a tar made elsewhere."""
    keys: list[str] = field(repr=False)
    """The samples' keys, in order."""
    tar_bytes: int
    """Size of the tar when it was indexed."""

    def __len__(self) -> int:
        return len(self.labels)

    def save(self, path: Path) -> None:
        """Write atomically."""
        blob = "\n".join(self.keys).encode("utf-8", "surrogateescape")
        tensors = {
            "offsets": self.offsets,
            "sizes": self.sizes,
            "labels": self.labels,
            "checksums": self.checksums,
            "keys": np.frombuffer(blob, dtype=np.uint8),
        }
        about = {"format": str(FORMAT), "parts": json.dumps(self.parts), "tar_bytes": str(self.tar_bytes)}
        write_atomically(path, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, about))


def load_index(path: Path) -> ShardIndex:
    """Read an index file; raises `UserError` when it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        blob = tensors.pop("keys").tobytes().decode("utf-8", "surrogateescape")
        return ShardIndex(
            parts=json.loads(about["parts"]),
            tar_bytes=int(about["tar_bytes"]),
            keys=blob.split("\n") if blob else [],
            **tensors,
        )
    except FileNotFoundError:
        raise UserError(f"{path} is missing; write the dataset again with `headwater shard`") from None
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); write the dataset again with `headwater shard`") from None


def index_tar(path: Path) -> ShardIndex:
    """The index of a WebDataset tar from elsewhere, from its headers and its `cls` parts.

    Members whose names agree up to the first dot of the base name are one sample (WebDataset's rule).

    Raises:
        UserError: the tar is compressed, damaged, empty, or holds a label that is no number.
    """
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    for member in members(path):
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:
            continue
        key = (folder + slash + stem).replace("\n", " ")
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        samples[-1][1][extension.lower()] = (member.offset, member.size)
    if not samples:
        raise UserError(f"{path} holds no samples (files named KEY.EXTENSION)")
    parts = sorted({extension for _, found in samples for extension in found})
    places = np.array([[found.get(part, (0, -1)) for part in parts] for _, found in samples], dtype=np.int64)
    return ShardIndex(
        parts=parts,
        offsets=places[:, :, 0],
        sizes=places[:, :, 1],
        labels=_labels(path, samples),
        checksums=np.zeros((0, len(parts)), dtype=np.uint32),
        keys=[key for key, _ in samples],
        tar_bytes=path.stat().st_size,
    )


def _labels(path: Path, samples: list[tuple[str, dict[str, tuple[int, int]]]]) -> NDArray[np.int64]:
    labels = np.full(len(samples), -1, dtype=np.int64)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for number, (key, found) in enumerate(samples):
            if "cls" in found:
                offset, size = found["cls"]
                text = os.pread(descriptor, min(size, 32), offset).decode("ascii", "replace").strip()
                if not text.lstrip("-").isdigit():
                    raise UserError(f"{path}: the label of sample {key!r} is {text!r}, not a class number")
                labels[number] = int(text)
    finally:
        os.close(descriptor)
    return labels


def checksum(payload: bytes) -> int:
    """CRC-32, as the index stores it."""
    return zlib.crc32(payload)
