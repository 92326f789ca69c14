"""One shard's index: where each sample's parts lie, its label, its checksum, its key.

Stored beside the tar as a safetensors file, so that reading one runs no code and can map the arrays.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data.errors import UserError
from data.files import write_atomically
from data.tar import members

IMAGE_PARTS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
TEXT_PARTS = ("npy",)
FORMAT = 1
_NUMBER = re.compile(r"-?[0-9]{1,18}")


class Places(NamedTuple):
    """What reading needs of an index: 32 bytes a sample."""

    table: NDArray[np.int64]
    """(n, 4): offset, size (-1: the sample has no such part), CRC-32, label."""
    checked: bool
    """Whether there are checksums."""


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
    names: bytes = field(repr=False)
    """The samples' keys, in order, one a line (a list of strings would take several times the memory)."""
    tar_bytes: int
    """Size of the tar when it was indexed."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keys(self) -> list[str]:
        """The samples' keys, in order."""
        return self.names.decode("utf-8", "surrogateescape").split("\n") if self.names else []

    def key(self, member: int) -> str:
        """The key of one sample."""
        first, last = self._ends[member] + 1, self._ends[member + 1]
        return self.names[first:last].decode("utf-8", "surrogateescape")

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """Where each line of `names` ends, -1 before the first."""
        breaks = np.flatnonzero(np.frombuffer(self.names, dtype=np.uint8) == ord("\n"))
        return np.concatenate([[-1], breaks, [len(self.names)]])

    def places(self, wanted: Sequence[str]) -> Places:
        """Where each sample's first part of a `wanted` kind lies."""
        table = np.full((len(self), 4), -1, dtype=np.int64)
        table[:, 3] = self.labels
        for column in reversed([number for number, part in enumerate(self.parts) if part in wanted]):
            here = self.sizes[:, column] >= 0
            table[here, 0], table[here, 1] = self.offsets[here, column], self.sizes[here, column]
            if len(self.checksums):
                table[here, 2] = self.checksums[here, column]
        return Places(table, bool(len(self.checksums)))

    def with_pictures(self, tar: Path) -> ShardIndex:
        """The index without samples that hold no picture (descriptions, read-me files).

        Where no part has a picture's extension but exactly one ends with it (`image.jpg`), that one is the picture
        and goes by the extension alone. Raises `UserError` when no sample holds a picture.
        """
        columns = [number for number, part in enumerate(self.parts) if part in IMAGE_PARTS]
        alike = [number for number, part in enumerate(self.parts) if part.rpartition(".")[2] in IMAGE_PARTS]
        if not columns and len(alike) == 1:
            columns = alike
        parts = [part.rpartition(".")[2] if number in columns else part for number, part in enumerate(self.parts)]
        kept = np.any(self.sizes[:, columns] >= 0, axis=1)
        if not kept.any():
            raise UserError(
                f"{tar} holds no pictures, only {', '.join(self.parts[:20])}; names are KEY.jpg, KEY.png, … (with "
                f"dots in the keys: `headwater shard convert --last-dot {tar} OUT`)"
            )
        return replace(
            self,
            parts=parts,
            offsets=self.offsets[kept],
            sizes=self.sizes[kept],
            labels=self.labels[kept],
            checksums=self.checksums[kept] if len(self.checksums) else self.checksums,
            names=join_keys(key for key, good in zip(self.keys, kept.tolist(), strict=True) if good),
        )

    def save(self, path: Path) -> None:
        """Write atomically."""
        tensors = {
            "offsets": self.offsets,
            "sizes": self.sizes,
            "labels": self.labels,
            "checksums": self.checksums,
            "keys": np.frombuffer(self.names, dtype=np.uint8),
        }
        about = {"format": str(FORMAT), "parts": json.dumps(self.parts), "tar_bytes": str(self.tar_bytes)}
        payload = save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, about)
        write_atomically(path, _ordered(payload))


def _ordered(payload: bytes) -> bytes:
    """The same safetensors file with its header in one order (safetensors' own changes from run to run)."""
    length = int.from_bytes(payload[:8], "little")
    header = json.dumps(json.loads(payload[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + payload[8 + length :]


def load_index(path: Path) -> ShardIndex:
    """Read an index file; raises `UserError` when it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = tensors.pop("keys").tobytes()
        return ShardIndex(
            parts=json.loads(about["parts"]),
            tar_bytes=int(about["tar_bytes"]),
            names=names,
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
        key, extension = split_name(member.name)
        if not extension:
            continue
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        if extension in samples[-1][1]:
            raise UserError(f"{path}: sample {key!r} has two parts {extension!r}; rename one and pack it again")
        samples[-1][1][extension] = (member.offset, member.size)
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
        names=join_keys(key for key, _ in samples),
        tar_bytes=path.stat().st_size,
    )


def split_name(name: str, last_dot: bool = False) -> tuple[str, str]:
    """Key and extension of a member: WebDataset ends the key at the first dot of the base name.

    With `last_dot` at the last one. The extension is in lower case, and empty for what is no part of a sample.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.rpartition(".") if last_dot else base.partition(".")
    if not stem or not extension:
        return name, ""
    return (folder + slash + stem).replace("\n", " "), extension.lower()


def join_keys(keys: Iterable[str]) -> bytes:
    """Keys as the index stores them; they hold no line breaks."""
    return "\n".join(keys).encode("utf-8", "surrogateescape")


def _labels(path: Path, samples: list[tuple[str, dict[str, tuple[int, int]]]]) -> NDArray[np.int64]:
    labels = np.full(len(samples), -1, dtype=np.int64)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for number, (key, found) in enumerate(samples):
            if "cls" in found:
                offset, size = found["cls"]
                labels[number] = class_number(os.pread(descriptor, min(size, 32), offset), path, key)
    finally:
        os.close(descriptor)
    return labels


def class_number(text: bytes, path: object, key: str) -> int:
    """What a `cls` part says; raises `UserError`, naming tar and sample, where that is no number."""
    label = text[:32].decode("ascii", "replace").strip()
    if not _NUMBER.fullmatch(label):
        raise UserError(f"{path}: the label of sample {key!r} is {label!r}, not a class number")
    return int(label)


def checksum(payload: bytes) -> int:
    """CRC-32, as the index stores it."""
    return isal_zlib.crc32(payload)
