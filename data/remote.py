"""Datasets behind fsspec URLs: opened by their manifest or their tars, read through the machine's cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from data.cache import Cache, cache_from_environment
from data.downloader import Downloader
from data.errors import DamagedData, UserError
from data.fetcher import Fetcher
from data.files import write_atomically
from data.index import ShardIndex, index_tar, load_index
from data.manifest import read_manifest
from data.shards import MANIFEST
from data.transfer import Remote

ORIGIN = "origin.json"
"""In a local folder of side files: where the dataset lies."""
_downloaders: dict[tuple[int, str, int], Downloader] = {}


class Remotes(Protocol):
    """What a storage asks of a `Downloader`, or of a `Fetcher` in its own process."""

    cache: Cache

    def look_up(self, urls: Sequence[str]) -> list[Remote]:
        """Size and version of each file."""

    def listed(self, url: str) -> list[str]:
        """The files behind a pattern or in a folder."""

    def read(self, url: str) -> bytes:
        """A small file."""

    def fetch(self, remote: Remote) -> None:
        """Return when it is in the cache."""

    def ahead(self, remotes: Sequence[Remote]) -> None:
        """Bring these next."""


def way_to(url: str) -> Remotes:
    """Who fetches what lies at `url`: this machine's downloader, or, for `memory://`, the process itself."""
    cache = cache_from_environment()
    if url.startswith("memory:"):
        return Fetcher(cache)
    place = (os.getpid(), str(cache.folder), cache.limit)
    if place not in _downloaders:
        _downloaders[place] = Downloader(cache)
    return _downloaders[place]


class RemoteStorage:
    """The shards of a remote dataset; see `data.storage.Storage`."""

    def __init__(
        self,
        way: Remotes,
        tars: list[Remote],
        indexes: list[Remote] | None,
        folder: Path,
        shards: list[dict[str, Any]],
    ) -> None:
        """`indexes` are the remote ones of a dataset of ours, None for tars made elsewhere.

        Raises `UserError` when the cache could not hold even two shards.
        """
        self.names, self.folder = [tar.url for tar in tars], folder
        self._way, self._tars, self._indexes, self._shards = way, tars, indexes, shards
        largest = max(shard["bytes"] for shard in shards)
        if 2 * largest > way.cache.limit:
            raise UserError(
                f"the cache {way.cache.folder} may hold {way.cache.limit:,} bytes, too few for shards of {largest:,}; "
                "set HEADWATER_CACHE_SIZE to hold twice what is shuffled together (data.shuffle_samples)"
            )
        # A quarter of the cache for each process: those of a machine mostly hold the same shards open.
        self.most_open = max(1, min(64, way.cache.limit // (4 * largest)))
        self.most_bytes: int | None = way.cache.limit

    def index(self, shard: int) -> ShardIndex:
        """See `Storage`."""
        described, name = self._shards[shard], self.names[shard]
        if self._indexes is None:
            index = _foreign_index(self._way, self._tars[shard])
        else:
            descriptor = self._held(self._indexes[shard])  # its bytes are those that the manifest names
            try:
                index = load_index(self._way.cache.path(self._indexes[shard].key))
            except UserError as error:
                raise DamagedData(f"{self._indexes[shard].url}: {error}") from None
            finally:
                os.close(descriptor)
        if index.tar_bytes != described["bytes"] or len(index) != described["samples"]:
            raise DamagedData(f"{name} has changed since it was indexed; restore it or write the dataset again")
        return index

    def open(self, shard: int) -> int:
        """See `Storage`."""
        return self._held(self._tars[shard])

    def ahead(self, shards: Sequence[int]) -> None:
        """See `Storage`."""
        wanted = []
        for shard in shards:
            wanted += [self._indexes[shard]] if self._indexes is not None else []
            wanted.append(self._tars[shard])
        self._way.ahead(wanted)

    def check(self, shard: int, descriptor: int) -> None:
        """Nothing: a file in the cache is written once."""

    def verify(self, shard: int) -> list[str]:
        """See `Storage`: whatever is fetched is compared with the manifest."""
        wrong = []
        for remote in [self._tars[shard]] + ([self._indexes[shard]] if self._indexes is not None else []):
            try:
                os.close(self._held(remote))
            except DamagedData as error:
                wrong.append(str(error))
        return wrong

    def _held(self, remote: Remote) -> int:
        """A descriptor of the cached file, fetched first where needed."""
        while True:
            descriptor = self._way.cache.open(remote.key)
            if descriptor is not None:
                return descriptor
            self._way.fetch(remote)


def open_folder(url: str) -> tuple[dict[str, Any], RemoteStorage] | None:
    """The dataset of ours in the folder `url`, as manifest and storage; None where no manifest lies there.

    Manifest and tokenizer are kept in a local folder, so that they can be read by path. The indexes are
    fetched one by one when they are needed.
    """
    url = url.rstrip("/")
    way = way_to(url)
    try:
        text = way.read(f"{url}/{MANIFEST}")
    except DamagedData:
        return None
    manifest = read_manifest(text, f"{url}/{MANIFEST}")
    shards = manifest["shards"]
    for shard in shards:
        if not {"sha256", "index_sha256"} <= set(shard):
            raise UserError(f"{url}/{MANIFEST} names no checksums, so its shards cannot be fetched safely")
    names = [shard["name"] for shard in shards]
    tars = [Remote(f"{url}/{n}", s["bytes"], "", s["sha256"]) for n, s in zip(names, shards, strict=True)]
    stems = [name.rpartition(".")[0] for name in names]
    indexes = [Remote(f"{url}/{n}.index", None, "", s["index_sha256"]) for n, s in zip(stems, shards, strict=True)]
    folder = _side_files(way, url, text, manifest["kind"])
    return manifest | {"foreign": False}, RemoteStorage(way, tars, indexes, folder, shards)


def _side_files(way: Remotes, url: str, text: bytes, kind: str) -> Path:
    name = hashlib.sha256(url.encode() + b"\n" + text).hexdigest()[:40]
    folder = way.cache.folder / "datasets" / name
    if (folder / ORIGIN).exists():
        return folder
    (folder / "validation").mkdir(parents=True, exist_ok=True)
    if kind == "text":
        write_atomically(folder / "tokenizer.json", way.read(f"{url}/tokenizer.json"))
        try:
            held_out = way.read(f"{url}/validation/{MANIFEST}")
        except DamagedData:
            pass
        else:
            write_atomically(folder / "validation" / MANIFEST, held_out)
            write_atomically(folder / "validation" / ORIGIN, json.dumps({"url": f"{url}/validation"}))
    write_atomically(folder / MANIFEST, text)
    write_atomically(folder / ORIGIN, json.dumps({"url": url}))  # last: all the rest is there
    return folder


def origin(folder: Path) -> str | None:
    """The URL that a local folder of side files stands for."""
    path = folder / ORIGIN
    return str(json.loads(path.read_text())["url"]) if path.exists() else None


def open_tars(urls: Sequence[str]) -> tuple[list[dict[str, Any]], RemoteStorage]:
    """Tars made elsewhere, as entries of a manifest and storage.

    Each is downloaded once to be indexed, several at a time, with what comes next fetched meanwhile; the
    indexes stay in the cache (they are small), the tars as long as there is room.
    """
    way = way_to(urls[0])
    tars = way.look_up(urls)
    missing = [tar for tar in tars if not _index_path(way, tar).exists()]
    if not isinstance(way, Fetcher):
        way.ahead(missing[:16])
    from tqdm import tqdm

    shards = []
    for tar in tqdm(tars, desc="indexing", unit="shard", disable=None if missing else True):
        if missing and tar == missing[0]:
            missing.pop(0)
            if not isinstance(way, Fetcher):
                way.ahead([tar, *missing[:16]])
        index = _foreign_index(way, tar)
        shards.append({"name": tar.url.rpartition("/")[2], "samples": len(index), "bytes": index.tar_bytes})
    folder = way.cache.folder / "index"
    return shards, RemoteStorage(way, tars, None, folder, shards)


def _index_path(way: Remotes, tar: Remote) -> Path:
    return way.cache.folder / "index" / f"{tar.key}.index"


def _foreign_index(way: Remotes, tar: Remote) -> ShardIndex:
    path = _index_path(way, tar)
    if path.exists():
        try:
            return load_index(path)
        except UserError:  # a damaged one is made again
            path.unlink(missing_ok=True)
    way.fetch(tar)
    local = way.cache.path(tar.key)
    descriptor = way.cache.open(tar.key)
    if descriptor is None:
        return _foreign_index(way, tar)
    try:
        index = index_tar(local).with_pictures(local)
    except UserError as error:
        raise UserError(str(error).replace(str(local), tar.url)) from None
    finally:
        os.close(descriptor)
    path.parent.mkdir(parents=True, exist_ok=True)
    index.save(path)
    return index
