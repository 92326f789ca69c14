"""What a user names as a dataset: a folder with a manifest of ours, or any WebDataset tars, here or elsewhere."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.foreign import foreign_index
from data.manifest import read_manifest
from data.patterns import expand_braces, is_url
from data.shards import MANIFEST, fingerprint
from data.storage import LocalStorage, Storage

Opened = tuple[dict[str, Any], Storage]
_PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")


def open_source(source: str | Path | Sequence[str | Path], tolerant: bool = False) -> Opened:
    """The manifest (made up for tars from elsewhere) and where the tars lie.

    `source` is a path or an fsspec URL: a folder, a tar, or a pattern with braces (`{000..119}`) or `*?[]`; or a
    list of them, all of tars. A `tolerant` reader learns of lost or resized shards only when it needs them.

    Raises:
        UserError: nothing is there, or it is damaged or cannot be had.
    """
    if isinstance(source, str | Path):
        opened = _folder(str(source), tolerant)
        if opened is not None:
            return opened
    names = [str(source)] if isinstance(source, str | Path) else [str(each) for each in source]
    tars = [tar for name in names for tar in find_tars(name)]
    if not tars:
        raise UserError("no shards were named; give a folder of shards or a list of tars")
    if len({is_url(tar) for tar in tars}) == 2:
        raise UserError("some of the shards lie here and some elsewhere; put them in one place, or mix two datasets")
    return _remote_tars(tars) if is_url(tars[0]) else _local_tars([Path(tar) for tar in tars])


def _folder(name: str, tolerant: bool) -> Opened | None:
    """A dataset of ours; None where there is no manifest."""
    from data import remote  # only those who read from elsewhere need its packages

    if is_url(name):
        return remote.open_folder(name) if not _wild(name) and not name.endswith(".tar") else None
    folder = Path(name).expanduser()
    if not (folder / MANIFEST).exists():
        return None
    url = remote.origin(folder)
    return remote.open_folder(url) if url else _ours(folder, tolerant)


def find_tars(name: str, packed: bool = False) -> list[str]:
    """The tars that one word names, in sorted order (braces in their own); compressed ones too if `packed`.

    Raises `UserError` for a word that names none, a folder with a manifest of ours (whose tars are not all of it),
    or one with compressed tars alone.
    """
    literal = not is_url(name) and Path(name).exists()
    return [tar for each in ([name] if literal else expand_braces(name)) for tar in _find(each, packed)]


def _find(name: str, packed: bool) -> list[str]:
    path = Path(name.removeprefix("file://")).expanduser()
    if is_url(name):
        found, folder = _find_remote(name)
    elif path.is_dir():
        found, folder = sorted(str(tar) for tar in path.iterdir() if not tar.name.startswith(".")), True
    elif path.exists():
        found, folder = [str(path)], False
    else:
        found, folder = sorted(glob.glob(str(path))), False
    if folder and any(tar.rpartition("/")[2] == MANIFEST for tar in found):
        raise UserError(f"{name} is a whole dataset; open it alone, not in a list of tars")
    tars = [tar for tar in found if tar.endswith((".tar", *_PACKED) if packed else ".tar")] if folder else found
    if not tars:
        squeezed = [tar for tar in found if tar.endswith(_PACKED)]
        if squeezed:
            raise UserError(
                f"{squeezed[0]} is compressed, which allows no random access; convert with "
                f"`headwater shard convert {name} OUT`"
            )
        if folder:
            raise UserError(f"{name} holds neither {MANIFEST} nor tar shards; write shards with `headwater shard`")
        raise UserError(f"{name} does not exist; give a folder of shards or a pattern such as 'data/*.tar'")
    return tars


def _find_remote(url: str) -> tuple[list[str], bool]:
    """What lies behind a URL, and whether it is a folder."""
    from data.remote import way_to

    if _wild(url):
        return way_to(url).listed(url), False
    if url.endswith((".tar", *_PACKED)):
        return [url], False
    return way_to(url).listed(url.rstrip("/") + "/"), True


def _wild(name: str) -> bool:
    return any(letter in name for letter in "*?[{")


def _ours(folder: Path, tolerant: bool) -> Opened:
    try:
        manifest = read_manifest((folder / MANIFEST).read_bytes(), folder / MANIFEST)
    except OSError as error:
        raise UserError(f"cannot read {folder / MANIFEST}: {error.strerror}") from None
    paths = [folder / shard["name"] for shard in manifest["shards"]]
    for shard, path in [] if tolerant else list(zip(manifest["shards"], paths, strict=True)):
        if not path.exists():
            raise UserError(f"shard {path} is named in {MANIFEST} but missing; restore it or write the dataset again")
        if path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"shard {path} has {path.stat().st_size} bytes, but {shard['bytes']} when it was indexed; "
                "restore it or write the dataset again"
            )
    return manifest | {"foreign": False}, LocalStorage(paths, manifest["shards"], foreign=False)


def _local_tars(paths: list[Path]) -> Opened:
    shards = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"shard {path} is missing")
        index = foreign_index(path)
        shards.append({"name": path.name, "samples": len(index), "bytes": index.tar_bytes})
    return _foreign(shards), LocalStorage(paths, shards, foreign=True)


def _remote_tars(urls: list[str]) -> Opened:
    from data.remote import open_tars

    shards, storage = open_tars(urls)
    return _foreign(shards), storage


def _foreign(shards: list[dict[str, Any]]) -> dict[str, Any]:
    about = {"kind": "images"}
    return about | {"shards": shards, "foreign": True, "fingerprint": fingerprint(shards, about)}
