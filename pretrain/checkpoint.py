"""Checkpoints that exist only when whole, and are believed only after checking.

A checkpoint is a folder: safetensors for tensors, JSON for the rest, nothing that runs. It is written
under a hidden name, every file forced to disk, a manifest of sizes and checksums last; then the folder
is renamed, and then `LATEST` (for people; nothing here believes it). Reading takes the newest folder that
matches its manifest, and reads no file that the manifest does not name. `pretrain.saver` does the writing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data import files
from data.errors import UserError
from data.files import Bytes, remove_folder, sync, write_atomically, write_durably
from pretrain.tensors import CHUNK, Stored

MANIFEST = "manifest.json"
STATE = "state.json"
Facts = dict[str, Any]
"""Of one file: its `bytes`, and `sha256`, the digests of each `CHUNK` of it."""
_NAME = re.compile(r"step-(\d{9,})")
_THREADS = 8
_BUFFER = 2**18


@dataclass
class Checkpoint:
    """A run's whole state between two steps."""

    tensors: dict[str, dict[str, Tensor]]
    """By kind: `model`, `optimizer`, …; the live tensors, whole or sharded (DTensor), not copies."""
    state: dict[str, Any]
    """What JSON holds: step, position, recipe, dataset fingerprint, loss scaler."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a newer one has been written."""

    last: int = 2
    """This many of the newest."""
    every: int = 0
    """And, for good, those whose step is a multiple of this; 0 for none."""


def checkpoint_name(step: int) -> str:
    """Of the checkpoint after `step` steps; names sort by age."""
    return f"step-{step:09d}"


def write_file(path: Path, chunks: Iterable[Bytes]) -> Facts:
    """Write a new file durably; its facts for the manifest come from what was to be written, not from the disk."""
    digests: list[str] = []
    count = 0

    def watched() -> Iterable[Bytes]:
        nonlocal count
        for chunk in chunks:
            digests.append(hashlib.sha256(chunk).hexdigest())
            count += len(chunk)
            yield chunk

    write_durably(path, watched())
    return {"bytes": count, "sha256": digests}


def commit(partial: Path, name: str, manifest: dict[str, Facts]) -> Path:
    """Turn a folder of forced files into the checkpoint `name` beside it; the newest one from then on."""
    folder, final = partial.parent, partial.parent / name
    write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1))
    _set_aside(final)
    files.disk.rename(partial, final)
    sync(folder)
    return final


def tidy(folder: Path, name: str, retention: Retention, spare: Callable[[str], bool] = lambda _: False) -> None:
    """Point `LATEST` at the checkpoint `name`, just committed; remove what it makes superfluous and what crashes left.

    Args:
        spare: whether a hidden name belongs to a save under way.
    """
    write_atomically(folder / "LATEST", name + "\n")
    found = complete(folder)
    older = [path for path in found if step_of(path) <= step_of(folder / name)]
    for path in older[: -retention.last]:
        if not (retention.every and step_of(path) % retention.every == 0):
            _remove(path)
    for path in found[len(older) :]:
        _set_aside(path)
    clear(folder, spare)


def go_back(path: Path) -> None:
    """Make a checkpoint the newest of its folder: later ones are removed, the newest first."""
    for later in reversed(complete(path.parent)):
        if step_of(later) > step_of(path):
            _remove(later)
    write_atomically(path.parent / "LATEST", path.name + "\n")


def clear(folder: Path, spare: Callable[[str], bool] = lambda _: False) -> None:
    """Remove half-written and half-removed checkpoints but those that `spare` says are being written."""
    for path in folder.glob(".*.partial"):
        if not spare(path.name):
            remove_folder(path)


def newest(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in `folder` that verifies, or None; damaged ones are reported and passed over."""
    for path in reversed(complete(folder)):
        reason = problem(path)
        if reason is None:
            return path
        report(f"checkpoint {path} is damaged ({reason}); looking for an older one")
    return None


def choose(folder: Path, resume: str, report: Callable[[str], None] = lambda _: None) -> Path | None:
    """Where a run goes on: `auto` is the newest good checkpoint in `folder`, `never` none, else a path.

    `report` is told about each damaged checkpoint that is passed over.

    Raises:
        UserError: the path does not verify; `never` in a folder that has checkpoints; all are damaged.
    """
    if resume not in ("auto", "never"):
        reason = problem(Path(resume))
        if reason:
            raise UserError(f"checkpoint {resume} cannot be used: {reason}")
        return Path(resume)
    found = complete(folder)
    if resume == "never" and found:
        raise UserError(f"{folder} already holds checkpoints; choose another --output or go on with --resume auto")
    chosen = newest(folder, report)
    if chosen is None and found:
        last = found[-1]
        raise UserError(f"no checkpoint in {folder} is whole ({last.name}: {problem(last)}); remove them to start anew")
    return chosen


def problem(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when every file matches the manifest.

    Checksums are computed on several threads, also within one file.
    """
    chunks: list[tuple[str, int, str]] = []
    try:
        manifest = read_manifest(path)
        for name, facts in manifest.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes instead of {facts['bytes']}"
            if len(facts["sha256"]) != -(-size // CHUNK):
                return f"{name} has another number of checksums than parts"
            chunks += [(name, number, digest) for number, digest in enumerate(facts["sha256"])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if STATE not in manifest:
        return f"{STATE} is missing from the manifest"
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        for reason in threads.map(lambda chunk: _chunk_problem(path / chunk[0], chunk[1], chunk[2]), chunks):
            if reason is not None:
                threads.shutdown(wait=False, cancel_futures=True)
                return reason
    return None


def read_manifest(path: Path) -> dict[str, Facts]:
    """By file name; raises `ValueError` where a name leads out of the folder."""
    manifest: dict[str, Facts] = json.loads((path / MANIFEST).read_text())
    for name in manifest:
        if Path(name).name != name:
            raise ValueError(f"{name!r} is no file name")
    return manifest


def read_state(path: Path) -> dict[str, Any]:
    """What JSON holds of a checkpoint that is known to be whole."""
    state: dict[str, Any] = json.loads((path / STATE).read_text())
    return state


def saved_setting(folder: Path, resume: str, section: str, key: str) -> Any:
    """What the run that goes on from `resume` (see `choose`) was begun with; None where there is none or it is lost."""
    found = complete(folder)
    path = (found[-1] if found else None) if resume in ("auto", "never") else Path(resume)
    try:
        return None if path is None else read_state(path)["identity"][section].get(key)
    except (OSError, ValueError, KeyError):
        return None  # whoever restores it says what is wrong


def read_tensors(path: Path, kind: str) -> Stored:
    """The tensors of one kind of a checkpoint that is known to be whole; nothing is read before it is asked for."""
    pattern = re.compile(re.escape(kind) + r"(-\d{5}-of-\d{5})?\.safetensors")
    return Stored([path / name for name in sorted(read_manifest(path)) if pattern.fullmatch(name)])


def complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or damaged, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    found = _NAME.fullmatch(path.name)
    assert found is not None, path
    return int(found[1])


def _set_aside(path: Path) -> None:
    """Take a checkpoint of a future that was given up (the run went on from an older one) out of sight.

    Were it left as it is, the next start would fall back into that future.
    """
    if not path.exists():
        return
    if problem(path):
        return _remove(path)
    number, aside = 1, path.with_name(f"abandoned-{path.name}")
    while aside.exists():
        number += 1
        aside = path.with_name(f"abandoned-{path.name}.{number}")
    files.disk.rename(path, aside)


def _remove(path: Path) -> None:
    """Hide a checkpoint, then delete it: one that is half gone is never to be seen."""
    hidden = path.with_name(f".{path.name}.old.partial")
    remove_folder(hidden)
    files.disk.rename(path, hidden)
    remove_folder(hidden)


def _digest(path: Path, start: int, count: int) -> str:
    """Of `count` bytes from `start`, or of what there is, through a buffer that stays in the processor's cache."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BUFFER))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while count and (read := file.readinto(buffer[: min(count, _BUFFER)])):
            digest.update(buffer[:read])
            count -= read
    return digest.hexdigest()


def _chunk_problem(path: Path, number: int, digest: str) -> str | None:
    try:
        found = _digest(path, number * CHUNK, CHUNK)
    except OSError as error:
        return f"{path.name} cannot be read ({error})"
    return None if found == digest else f"{path.name} does not match its checksum"
