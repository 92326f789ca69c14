"""What a user names as a dataset: a folder with a manifest of ours, or any WebDataset tars."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.index import ShardIndex, index_tar, load_index
from data.keyed import hash_texts
from data.shards import FORMAT, MANIFEST, fingerprint

_CACHE_SEED = 0xCAC8E
_FIELDS = ("fingerprint", "shards")
_TEXT_FIELDS = (*_FIELDS, "dtype", "block_tokens", "vocab_size", "bos", "documents", "tokens", "bytes")


def open_source(source: str | Path | Sequence[str | Path]) -> tuple[dict[str, Any], list[Path]]:
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
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder / MANIFEST} is of format {manifest['format']}; this version reads {FORMAT}")
        text = manifest["kind"] == "text"
        _require(manifest, _TEXT_FIELDS if text else _FIELDS)
        for shard in manifest["shards"]:
            _require(shard, ("name", "samples", "bytes", "tokens") if text else ("name", "samples", "bytes"))
        paths = [folder / Path(shard["name"]).name for shard in manifest["shards"]]
    except OSError as error:
        raise UserError(f"cannot read {folder / MANIFEST}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
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


def _require(found: dict[str, Any], names: Sequence[str]) -> None:
    """Raises `KeyError` when a field is missing, `ValueError` when there are no shards."""
    missing = [name for name in names if name not in found]
    if missing:
        raise KeyError(f"no {missing[0]}")
    if not found.get("shards", True):
        raise ValueError("it names no shards")


def _foreign(paths: list[Path]) -> tuple[dict[str, Any], list[Path]]:
    if not paths:
        raise UserError("no shards were named; give a folder of shards or a list of tars")
    shards = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"shard {path} is missing")
        index = foreign_index(path)
        shards.append({"name": path.name, "samples": len(index), "bytes": index.tar_bytes})
    about = {"kind": "images"}
    return about | {"shards": shards, "foreign": True, "fingerprint": fingerprint(shards, about)}, paths


def foreign_index(tar: Path) -> ShardIndex:
    """The index of a tar made elsewhere: kept beside it, or in the user's cache where that is read-only."""
    stat = tar.stat()
    name = f"{tar.name}.{stat.st_size}-{stat.st_mtime_ns}.index"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "headwater" / "index"
    homes = [tar.parent / f".{name}", cache / f"{int(hash_texts(_CACHE_SEED, [str(tar.resolve())])[0]):016x}-{name}"]
    for home in homes:
        if home.exists():
            with suppress(UserError):  # a damaged one is made again
                return load_index(home)
    index = index_tar(tar).with_pictures(tar)
    for home in homes:
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            index.save(home)
            break
        except OSError:
            continue
    return index
