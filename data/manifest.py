"""Reading the manifest of a dataset: every field that is relied on is checked here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from data.errors import UserError
from data.shards import FORMAT

_FIELDS = ("fingerprint", "shards")
_TEXT_FIELDS = (*_FIELDS, "dtype", "block_tokens", "vocab_size", "bos", "documents", "tokens", "bytes")


def read_manifest(payload: bytes, where: object) -> dict[str, Any]:
    """The manifest in a file's bytes; raises `UserError` (naming `where`) when it is damaged or of another format."""
    try:
        manifest = json.loads(payload.decode("utf-8"))
        if manifest["format"] != FORMAT:
            raise UserError(f"{where} is of format {manifest['format']}; this version reads {FORMAT}")
        text = manifest["kind"] == "text"
        _require(manifest, _TEXT_FIELDS if text else _FIELDS)
        for shard in manifest["shards"]:
            _require(shard, ("name", "samples", "bytes", "tokens") if text else ("name", "samples", "bytes"))
            # A name is one file beside the manifest, whatever a forged one says.
            shard["name"] = str(shard["name"]).rpartition("/")[2]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where} is damaged ({error}); write the dataset again") from None
    return dict(manifest)


def _require(found: dict[str, Any], names: Sequence[str]) -> None:
    """Raises `KeyError` when a field is missing, `ValueError` when there are no shards."""
    missing = [name for name in names if name not in found]
    if missing:
        raise KeyError(f"no {missing[0]}")
    if not found.get("shards", True):
        raise ValueError("it names no shards")
