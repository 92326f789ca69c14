"""Opening a dataset: folders with a manifest of ours, or any WebDataset tars."""

from __future__ import annotations

import glob
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.index import IMAGE_PARTS, ShardIndex, checksum, index_tar, load_index
from data.keyed import hash64
from data.shards import FORMAT, MANIFEST, fingerprint

Ints = NDArray[np.int64]
_OPEN_FILES = 64
_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_SPLIT_SEED = 0x5B17


class ShardedDataset:
    """Random access to the samples of tar shards.

    `source` is a folder written by `headwater shard`, a folder or glob of WebDataset tars made elsewhere
    (indexed on first use), or a list of tars. `len()` counts samples: pictures, or for text the rows of
    `context + 1` tokens that start every `context` tokens within a shard (the tail of each shard that
    fills no row is not used).
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        *,
        context: int | None = None,
        kind: str | None = None,
    ) -> None:
        """Raises `UserError` when something is missing, damaged, of another `kind` than asked for, or has
        changed since it was indexed."""
        self.manifest, self.paths = _open(source)
        self.kind: str = self.manifest["kind"]
        if kind is not None and self.kind != kind:
            raise UserError(f"{source} holds {self.kind}, where {kind} should be; give another folder of shards")
        self.classes: list[str] = self.manifest.get("classes", [])
        self.fingerprint: str = self.manifest["fingerprint"]
        self.folder = self.paths[0].parent
        self.context = context
        if self.kind == "text" and context is None:
            raise UserError(f"{self.folder} holds text; give the number of tokens in a row (context)")
        self.sizes = self._sample_counts()
        """Samples of each shard, before any split."""
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        """The first sample id of each shard."""
        self._chosen: list[Ints] | None = None
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._files: OrderedDict[int, int] = OrderedDict()

    @property
    def counts(self) -> Ints:
        """Samples of each shard that this view holds."""
        return self.sizes if self._chosen is None else np.array([len(c) for c in self._chosen], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.counts.sum())

    def ids(self, shards: Ints, members: Ints) -> Ints:
        """Sample ids (the same in every view of the dataset) of places in this view."""
        if self._chosen is not None:
            members = np.array([self._chosen[s][m] for s, m in zip(shards, members, strict=True)], dtype=np.int64)
        return self.starts[shards] + members

    def all_ids(self) -> Ints:
        """The ids of all samples of this view, ascending."""
        if self._chosen is None:
            return np.arange(len(self), dtype=np.int64)
        return np.concatenate([self.starts[s] + chosen for s, chosen in enumerate(self._chosen)])

    def labels(self) -> Ints:
        """Class numbers of this view's samples in id order, -1 where there is none: int64 (n,)."""
        return self._all_labels[self.all_ids()]

    @cached_property
    def _all_labels(self) -> Ints:
        return np.concatenate([self._index(shard).labels for shard in range(len(self.paths))])

    def key(self, identity: int) -> str:
        """The key under which sample `identity` stands in its tar."""
        shard, member = self._place(identity)
        return self._index(shard).keys[member]

    def image(self, identity: int) -> tuple[bytes, int]:
        """Encoded picture and label of a sample; raises `UserError` when it has no picture."""
        shard, member = self._place(identity)
        index = self._index(shard)
        for column, part in enumerate(index.parts):
            if part in IMAGE_PARTS and index.sizes[member, column] >= 0:
                return self._part(shard, member, column), int(index.labels[member])
        raise UserError(f"sample {index.keys[member]!r} in {self.paths[shard]} holds no picture ({index.parts})")

    def row(self, identity: int) -> Ints:
        """The `context + 1` token ids of a row: int64 (context + 1,)."""
        assert self.context is not None
        shard, row = self._place(identity)
        block_tokens = self.manifest["block_tokens"]
        first = row * self.context
        last = first + self.context + 1
        pieces = []
        for block in range(first // block_tokens, (last - 1) // block_tokens + 1):
            tokens = _tokens(self._part(shard, block, 0), self.manifest["dtype"])
            start = block * block_tokens
            pieces.append(tokens[max(first - start, 0) : last - start])
        return np.concatenate(pieces).astype(np.int64)

    def split(self, validation: float) -> tuple[Self, Self]:
        """Two views, (train, validation): a sample's key decides on which side it falls.

        Raises:
            UserError: for text (whose rows share documents), or when a side would be empty.
        """
        if self.kind != "images":
            raise UserError("text is split by document when it is sharded: headwater shard text --validation")
        sides: tuple[list[Ints], list[Ints]] = ([], [])
        for shard in range(len(self.paths)):
            words = [int(hash64(_SPLIT_SEED, *_words(key))) for key in self._index(shard).keys]
            held_out = np.array(words, dtype=np.uint64) < np.uint64(validation * 2.0**64)
            sides[0].append(np.flatnonzero(~held_out))
            sides[1].append(np.flatnonzero(held_out))
        train, valid = self._view(sides[0]), self._view(sides[1])
        if not len(train) or not len(valid):
            raise UserError(f"a validation share of {validation} leaves one side of {len(self)} samples empty")
        return train, valid

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay behind when a worker process gets its copy.
        return self.__dict__ | {"_files": OrderedDict()}

    def _view(self, chosen: list[Ints]) -> Self:
        view = self.__class__.__new__(self.__class__)
        view.__dict__.update(self.__dict__ | {"_chosen": chosen, "_files": OrderedDict()})
        return view

    def _sample_counts(self) -> Ints:
        shards = self.manifest["shards"]
        if self.context is None or self.kind != "text":
            return np.array([shard["samples"] for shard in shards], dtype=np.int64)
        rows = np.array([(shard["tokens"] - 1) // self.context for shard in shards], dtype=np.int64)
        if not rows.sum():
            longest = max(shard["tokens"] for shard in shards)
            raise UserError(f"no shard of {self.folder} has {self.context + 1} tokens (the longest has {longest})")
        return np.maximum(rows, 0)

    def _place(self, identity: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, identity, side="right")) - 1
        return shard, int(identity - self.starts[shard])

    def _index(self, shard: int) -> ShardIndex:
        if shard not in self._indexes:
            path = self.paths[shard]
            index = _foreign_index(path) if self.manifest["foreign"] else load_index(path.with_suffix(".index"))
            if index.tar_bytes != path.stat().st_size:
                raise UserError(f"{path} has changed since it was indexed; restore it or write the dataset again")
            self._indexes[shard] = index
        return self._indexes[shard]

    def _part(self, shard: int, member: int, column: int) -> bytes:
        index = self._index(shard)
        size, offset = int(index.sizes[member, column]), int(index.offsets[member, column])
        payload = os.pread(self._file(shard), size, offset)
        good = len(payload) == size
        if good and len(index.checksums):
            good = checksum(payload) == int(index.checksums[member, column])
        if not good:
            raise UserError(
                f"{self.paths[shard]} has changed or is damaged: sample {index.keys[member]!r} does not match "
                "its index; run `headwater inspect` and restore the shard"
            )
        return payload

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            try:
                self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
            except OSError as error:
                raise UserError(f"cannot read {self.paths[shard]}: {error.strerror}") from None
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return self._files[shard]

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_files", {}).values():
            os.close(descriptor)


def _open(source: str | Path | Sequence[str | Path]) -> tuple[dict[str, Any], list[Path]]:
    """The manifest (made up for tars from elsewhere) and the tars' paths."""
    if not isinstance(source, str | Path):
        return _foreign([Path(path) for path in source])
    path = Path(source).expanduser()
    if path.is_dir() and (path / MANIFEST).exists():
        return _ours(path)
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if not tars:
            raise UserError(f"{path} holds neither {MANIFEST} nor tar shards; write shards with `headwater shard`")
        return _foreign(tars)
    tars = [Path(name) for name in sorted(glob.glob(str(path)))]
    if not tars:
        raise UserError(f"{source} does not exist; give a folder of shards or a pattern such as 'data/*.tar'")
    return _foreign(tars)


def _ours(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        paths = [folder / Path(shard["name"]).name for shard in manifest["shards"]]
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder / MANIFEST} is of format {manifest['format']}; this version reads {FORMAT}")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST} is damaged ({error}); write the dataset again") from None
    for shard, path in zip(manifest["shards"], paths, strict=True):
        if not path.exists():
            raise UserError(f"shard {path} is named in {MANIFEST} but missing; restore it or write the dataset again")
        if path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"shard {path} has {path.stat().st_size} bytes, but {shard['bytes']} when it was indexed; "
                "restore it or write the dataset again"
            )
    return manifest | {"foreign": False}, paths


def _foreign(paths: list[Path]) -> tuple[dict[str, Any], list[Path]]:
    shards = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"shard {path} is missing")
        index = _foreign_index(path)
        if not any(part in IMAGE_PARTS for part in index.parts):
            raise UserError(f"{path} holds no pictures, only {', '.join(index.parts)}; pictures end in jpg, png, …")
        shards.append({"name": path.name, "samples": len(index), "bytes": index.tar_bytes})
    about = {"kind": "images"}
    return about | {"shards": shards, "foreign": True, "fingerprint": fingerprint(shards, about)}, paths


def _foreign_index(tar: Path) -> ShardIndex:
    """The index of a tar made elsewhere: kept beside it, or in the user's cache where that is read-only."""
    stat = tar.stat()
    name = f"{tar.name}.{stat.st_size}-{stat.st_mtime_ns}.index"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headwater" / "index"
    homes = [tar.parent / f".{name}", cache / f"{int(hash64(*_words(str(tar.resolve())))):016x}-{name}"]
    for home in homes:
        if home.exists():
            return load_index(home)
    index = index_tar(tar)
    for home in homes:
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            index.save(home)
            break
        except OSError:
            continue
    return index


def _words(text: str) -> list[int]:
    """A string as 63-bit words, for hashing."""
    payload = text.encode("utf-8", "surrogateescape")
    return [int.from_bytes(payload[i : i + 7], "little") for i in range(0, len(payload), 7)] + [len(payload)]


def _tokens(payload: bytes, dtype: str) -> NDArray[Any]:
    """The array in a version-1 npy file, without parsing its header's text."""
    assert payload.startswith(_NPY_MAGIC)
    return np.frombuffer(payload, dtype=np.dtype(dtype), offset=10 + int.from_bytes(payload[8:10], "little"))
