"""Real data that needs no download: scikit-learn's handwritten digits, the standard library's own source."""

from __future__ import annotations

import json
import sysconfig
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from data.errors import UserError
from data.keyed import hash64
from data.shards import DatasetWriter

_SPLIT_SEED = 0xD161
_DIGITS_TEST = 500
_DIGITS_SHARDS = 4
_LARGEST_SOURCE = 200_000
"""Bytes; longer files of the standard library are tables and test data."""


def shard_digits(out: Path, overwrite: bool = False) -> tuple[Path, Path]:
    """Write the 1,797 8x8 digits of scikit-learn as PNGs: 1,297 in `out/train`, 500 in `out/test`.

    Scans of handwritten digits (Alpaydin and Kaynak 1998), grey with 17 levels, labelled 0 to 9. The split
    is fixed.
    """
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    order = np.argsort(hash64(_SPLIT_SEED, np.arange(len(labels), dtype=np.int64)), kind="stable")
    sides = {"train": order[_DIGITS_TEST:], "test": order[:_DIGITS_TEST]}
    for side, numbers in sides.items():
        size = -(-len(numbers) // _DIGITS_SHARDS)
        with DatasetWriter(out / side, "images", size, overwrite) as writer:
            writer.extra = {"classes": [str(digit) for digit in range(10)]}
            for number in numbers:
                buffer = BytesIO()
                grey = np.round(pictures[number].reshape(8, 8) * (255 / 16)).astype(np.uint8)
                Image.fromarray(grey).save(buffer, format="PNG")
                writer.add(f"{labels[number]}/{number:04d}", {"png": buffer.getvalue()}, int(labels[number]))
    return out / "train", out / "test"


def standard_library_sources(most_bytes: int = 8_000_000) -> list[Path]:
    """Python files of the running interpreter's standard library, a fixed spread of up to `most_bytes`.

    Raises:
        UserError: the interpreter was installed without its source.
    """
    home = Path(sysconfig.get_paths()["stdlib"])
    skipped = ("test", "tests", "site-packages", "__pycache__", "dist-packages", "idlelib", "lib2to3", "encodings")
    files = [
        path
        for path in sorted(home.rglob("*.py"))
        if not set(skipped) & set(path.relative_to(home).parts)
        and path.is_file()
        and 0 < path.stat().st_size <= _LARGEST_SOURCE
    ]
    if not files:
        raise UserError(f"{home} holds no Python source; give your own text to `headwater shard text`")
    order = np.argsort(hash64(_SPLIT_SEED, np.arange(len(files), dtype=np.int64)), kind="stable")
    chosen, total = [], 0
    for number in order:
        total += files[number].stat().st_size
        if total > most_bytes:
            break
        chosen.append(files[number])
    return sorted(chosen)


def write_source_task(out: Path, classes: int = 6, most: int = 80) -> tuple[Path, Path, Path]:
    """Source code as unlabelled text and as a labelled task: which package does a snippet come from?

    The `classes` packages of the standard library with the most source make the task, with up to `most`
    snippets each for training and for testing. A quarter of each one's files is for testing and appears
    nowhere else.

    Returns:
        A folder of unlabelled files, and JSONL files of labelled snippets (`text`, `label`) for training and
        for testing.
    """
    home = Path(sysconfig.get_paths()["stdlib"])
    files = standard_library_sources()
    packages: dict[str, list[Path]] = {}
    for path in files:
        parts = path.relative_to(home).parts
        if len(parts) > 1:
            packages.setdefault(parts[0], []).append(path)
    weights = {name: sum(path.stat().st_size for path in paths) for name, paths in packages.items()}
    largest = sorted((name for name in packages if len(packages[name]) >= 8), key=lambda name: -weights[name])
    chosen = sorted(largest[:classes])
    sides: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    tested = {path for name in chosen for path in packages[name][3::4]}
    for name in chosen:
        for side in sides:
            paths = [path for path in packages[name] if (path in tested) == (side == "test")]
            found = [text for path in paths for text in _snippets(path)]
            order = np.argsort(hash64(_SPLIT_SEED, np.arange(len(found), dtype=np.int64)), kind="stable")
            sides[side] += [{"text": found[number], "label": name} for number in order[:most]]
    (out / "unlabelled").mkdir(parents=True)
    for path in files:
        if path not in tested:
            copy = out / "unlabelled" / path.relative_to(home)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    for side, rows in sides.items():
        (out / f"{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out / "unlabelled", out / "train.jsonl", out / "test.jsonl"


def _snippets(path: Path, lines: int = 6) -> list[str]:
    """Pieces of `lines` lines of a file, without the nearly empty ones."""
    rows = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pieces = ["\n".join(rows[start : start + lines]) for start in range(0, len(rows), lines)]
    return [piece for piece in pieces if len(piece.split()) >= 12]
