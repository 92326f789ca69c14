"""Text sharded in parts: each part takes every n-th file and makes a dataset, merging renames and adds up."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.documents import find_text
from data.errors import UserError
from data.files import remove_folder, sha256
from data.parts import FOLDER, Part, PartFolder
from data.shards import FORMAT, MANIFEST, shard_name, write_manifest
from data.text import shard_text

_COUNTS = ("documents", "tokens", "bytes")
_NOT_ABOUT = ("format", "fingerprint", "kind", "shards", "plan")


def shard_text_part(
    sources: Sequence[str | Path], out: Path, part: Part, *, tokenizer: str | Path | None, **arguments: Any
) -> dict[str, Any]:
    """Tokenise every `part.count`-th file of `sources`; see `data.text.shard_text` for the arguments and result.

    The part is the unit of resuming: one that was killed starts anew, one that is done does nothing. Documents
    are packed within their part, so the shards (and the fingerprint) depend on the number of parts.

    Raises:
        UserError: no tokenizer was named, since all parts must use one; see also `PartFolder`.
    """
    if tokenizer is None:
        raise UserError(
            "all parts must use one tokenizer; train it on some of the files (`headwater shard text FILES SMALL`) and "
            "give --tokenizer SMALL to every part"
        )
    files = sorted(find_text(sources))
    named_file = Path(tokenizer)
    file = named_file / "tokenizer.json" if named_file.is_dir() else named_file
    if not file.is_file():
        raise UserError(f"no tokenizer at {file}; name a tokenizer.json or the folder of a text dataset")
    named = hashlib.sha256("\n".join(map(os.fspath, files)).encode("utf-8", "surrogateescape")).hexdigest()
    settings = {name: value for name, value in sorted(arguments.items()) if name not in ("progress", "workers")}
    plan = {"kind": "text", "files": named, "tokenizer": sha256(file), "settings": settings}
    folder = PartFolder(out, plan, part)
    if folder.done:
        return {"already": True}
    mine = files[part.number :: part.count]
    summary: dict[str, Any] = {"documents": 0, "tokens": 0, "bytes": 0, "shards": 0}
    if mine:
        summary = shard_text(mine, _inner(out, part.number), tokenizer=tokenizer, overwrite=True, **arguments)
    folder.finish()
    return summary | {"already": False}


def merge_text(out: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Join finished parts; what a killed merge left is gone over again. See `data.parts.merge`."""
    parts = [folder for number in range(plan["parts"]) if (folder := _inner(out, number)).is_dir()]
    if not parts:
        raise UserError(f"the sources of {out} held no text")
    held_out = [part / "validation" for part in parts if (part / "validation" / MANIFEST).exists()]
    if held_out:
        _join(held_out, out / "validation", plan["plan"])
    total = _join(parts, out, plan["plan"])  # last: without its manifest `out` is no dataset
    remove_folder(out / FOLDER)
    return total | {"unreadable": 0}


def _join(parts: list[Path], out: Path, plan: str) -> dict[str, Any]:
    manifests = [json.loads((part / MANIFEST).read_text()) for part in parts]
    if any(manifest["format"] != FORMAT for manifest in manifests):
        raise UserError(f"the parts of {out} were written by another version; write them again")
    out.mkdir(exist_ok=True)
    entries: list[dict[str, Any]] = []
    for part, manifest in zip(parts, manifests, strict=True):
        for entry in manifest["shards"]:
            name = shard_name(len(entries))
            for suffix in (".tar", ".index"):
                _place((part / entry["name"]).with_suffix(suffix), (out / name).with_suffix(suffix))
            entries.append(entry | {"name": name})
    shutil.copyfile(parts[0] / "tokenizer.json", out / "tokenizer.json")
    about = {}
    for name in (name for name in manifests[0] if name not in _NOT_ABOUT):
        values = [manifest[name] for manifest in manifests]
        if name in _COUNTS:
            about[name] = sum(values)
        elif all(value == values[0] for value in values):
            about[name] = values[0]
    write_manifest(out, "text", about, entries, plan=plan)
    counts = {name: about[name] for name in _COUNTS}
    return counts | {"samples": sum(entry["samples"] for entry in entries), "shards": len(entries)}


def _place(old: Path, new: Path) -> None:
    """A second name for a file, or a copy where the file system knows none; the first one stays."""
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def _inner(out: Path, number: int) -> Path:
    return out / FOLDER / f"text-{number}"
