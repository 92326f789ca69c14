"""The index of a tar made elsewhere: made once, kept beside it or in the user's cache."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from data.errors import UserError
from data.index import ShardIndex, index_tar, load_index
from data.keyed import hash_texts

_CACHE_SEED = 0xCAC8E


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
