"""Named tensors as safetensors files: copied into host memory at once, written later, read back in rows.

The format (huggingface.co/docs/safetensors): the header's length as eight little-endian bytes, a JSON header, then
the tensors' bytes. Here the bytes are laid out in host memory exactly as in the file, so that a save is one pass of
copies, and writing it needs neither Python objects nor the tensors themselves.

A tensor may be cut along its first dimension over the files of several processes; each file then says, in its
metadata, from which row its piece starts and how many rows there are in all.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

CHUNK = 64 * 2**20
"""Bytes that are written, and checked, at once."""
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Piece:
    """What one process holds of a tensor."""

    tensor: Tensor
    rows: tuple[int, int] | None = None
    """Of a tensor that is cut: the first row here, and the number of rows of the whole."""


class HostFile:
    """One safetensors file in host memory, used again by each save that has the same layout."""

    def __init__(self, pieces: Mapping[str, Piece], pin: bool) -> None:
        """Reserve the memory for tensors like these; page-locked with `pin`, so that a GPU copies at full speed.

        Raises `TypeError` for a dtype that safetensors does not know.
        """
        self.layout = layout(pieces)
        # Wide types first, as safetensors orders them, so that every tensor lies aligned.
        order = sorted(pieces, key=lambda name: (-pieces[name].tensor.element_size(), name))
        header: dict[str, object] = {"__metadata__": _metadata(pieces)}
        place = 0
        self._places: dict[str, tuple[int, int]] = {}
        for name in order:
            tensor = pieces[name].tensor
            end = place + tensor.numel() * tensor.element_size()
            header[name] = {"dtype": _code(tensor), "shape": list(tensor.shape), "data_offsets": [place, end]}
            self._places[name], place = (place, end), end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self._bytes = torch.empty(place, dtype=torch.uint8, pin_memory=pin)

    def __len__(self) -> int:
        """Bytes of the file."""
        return len(self._header) + self._bytes.numel()

    @torch.no_grad()
    def copy(self, pieces: Mapping[str, Piece]) -> None:
        """Take the tensors' present values; from a GPU without waiting, so synchronise before writing."""
        for name, (start, end) in self._places.items():
            tensor = pieces[name].tensor
            place = self._bytes[start:end].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor, non_blocking=True)

    def chunks(self) -> Iterator[memoryview]:
        """The file's bytes, in chunks of `CHUNK`."""
        whole = memoryview(self._bytes.numpy())  # type: ignore[arg-type]
        # The first one holds the header, so that chunks are the same whether the file is written or read.
        first = CHUNK - len(self._header) % CHUNK
        yield memoryview(self._header + bytes(whole[:first]))
        for start in range(first, len(whole), CHUNK):
            yield whole[start : start + CHUNK]


class Stored:
    """Tensors on disk, of one file or cut over several; read when asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [safe_open(path, framework="pt") for path in paths]
        self._pieces: dict[str, list[tuple[int, int]]] = {}
        """By name: (first row, number of the file), ascending."""
        self._rows: dict[str, int] = {}
        for number, file in enumerate(self._files):
            cut = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():  # noqa: SIM118 - no mapping
                start, rows = cut.get(name, (0, -1))
                self._pieces.setdefault(name, []).append((start, number))
                self._rows[name] = rows
        for pieces in self._pieces.values():
            pieces.sort()

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        found = tuple(self._files[self._pieces[name][0][1]].get_slice(name).get_shape())
        return found if self._rows[name] < 0 else (self._rows[name], *found[1:])

    def whole(self, name: str) -> Tensor:
        """The tensor, its pieces joined."""
        if self._rows[name] < 0:
            return self._files[self._pieces[name][0][1]].get_tensor(name)
        return self.rows(name, 0, self._rows[name])

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """Rows `start` to `start + count` of the whole tensor, however it was cut when it was saved."""
        if self._rows[name] < 0:
            return self._files[self._pieces[name][0][1]].get_slice(name)[start : start + count]
        found = []
        for first, number in self._pieces[name]:
            piece = self._files[number].get_slice(name)
            low, high = max(start, first), min(start + count, first + piece.get_shape()[0])
            if low < high:
                found.append(piece[low - first : high - first])
        if not found:
            return self._files[self._pieces[name][0][1]].get_slice(name)[:0]
        return torch.cat(found)


def layout(pieces: Mapping[str, Piece]) -> dict[str, tuple[object, ...]]:
    """What decides where each tensor lies in the file."""
    return {name: (piece.tensor.dtype, tuple(piece.tensor.shape), piece.rows) for name, piece in pieces.items()}


def size(pieces: Mapping[str, Piece]) -> int:
    """Bytes of all pieces."""
    return sum(prod(piece.tensor.shape) * piece.tensor.element_size() for piece in pieces.values())


def _metadata(pieces: Mapping[str, Piece]) -> dict[str, str]:
    rows = {name: piece.rows for name, piece in pieces.items() if piece.rows is not None}
    return {"format": "pt"} | ({"rows": json.dumps(rows)} if rows else {})


def _code(tensor: Tensor) -> str:
    if tensor.dtype not in _CODES:
        raise TypeError(f"safetensors has no {tensor.dtype}")
    return _CODES[tensor.dtype]
