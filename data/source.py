"""What a user names as a dataset: a folder with a manifest of ours, or any WebDataset tars."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.foreign import foreign_index
from data.shards import FORMAT, MANIFEST, fingerprint
from data.storage import LocalStorage, Storage

_FIELDS = ("fingerprint", "shards")
_TEXT_FIELDS = (*_FIELDS, "dtype", "block_tokens", "vocab_size", "bos", "documents", "tokens", "bytes")


def open_source(source: str | Path | Sequence[str | Path], tolerant: bool = False) -> tuple[dict[str, Any], Storage]:
    """The manifest (made up for tars from elsewhere) and where the tars lie.

    A `tolerant` reader learns of lost or resized shards only when it needs them.
    """
    if not isinstance(source, str | Path):
        return _foreign([Path(path) for path in source])
    path = Path(source).expanduser()
    if path.is_dir() and (path / MANIFEST).exists():
        return _ours(path, tolerant)
    if path.is_dir():
        tars = sorted(path.glob("*.tar"))
        if not tars:
            raise UserError(f"{path} holds neither {MANIFEST} nor tar shards; write shards with `headwater shard`")
        return _foreign(tars)
    tars = [Path(name) for name in sorted(glob.glob(str(path)))]
    if not tars:
        raise UserError(f"{source} does not exist; give a folder of shards or a pattern such as 'data/*.tar'")
    return _foreign(tars)


def _ours(folder: Path, tolerant: bool) -> tuple[dict[str, Any], Storage]:
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
    for shard, path in [] if tolerant else list(zip(manifest["shards"], paths, strict=True)):
        if not path.exists():
            raise UserError(f"shard {path} is named in {MANIFEST} but missing; restore it or write the dataset again")
        if path.stat().st_size != shard["bytes"]:
            raise UserError(
                f"shard {path} has {path.stat().st_size} bytes, but {shard['bytes']} when it was indexed; "
                "restore it or write the dataset again"
            )
    return manifest | {"foreign": False}, LocalStorage(paths, manifest["shards"], foreign=False)


def _require(found: dict[str, Any], names: Sequence[str]) -> None:
    """Raises `KeyError` when a field is missing, `ValueError` when there are no shards."""
    missing = [name for name in names if name not in found]
    if missing:
        raise KeyError(f"no {missing[0]}")
    if not found.get("shards", True):
        raise ValueError("it names no shards")


def _foreign(paths: list[Path]) -> tuple[dict[str, Any], Storage]:
    if not paths:
        raise UserError("no shards were named; give a folder of shards or a list of tars")
    shards = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"shard {path} is missing")
        index = foreign_index(path)
        shards.append({"name": path.name, "samples": len(index), "bytes": index.tar_bytes})
    about = {"kind": "images"}
    manifest = about | {"shards": shards, "foreign": True, "fingerprint": fingerprint(shards, about)}
    return manifest, LocalStorage(paths, shards, foreign=True)
