"""Folders of picture files -> shards."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.errors import UserError
from data.index import IMAGE_PARTS
from data.keyed import hash64
from data.parts import Part, PartFolder
from data.picture_files import from_csv, from_folders, printable, sorted_labels, unique_keys, without_duplicates
from data.picture_shard import Picture, ShardDone, ShardJob, write_shard
from data.reencode import Remaking
from data.shards import DatasetWriter, check_free, shard_name

_ORDER_SEED = 0x0D3A
_DIE_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""
_NOT_BESIDE = frozenset((*IMAGE_PARTS, "cls"))


@dataclass(frozen=True)
class Choices:
    """How pictures become shards; everything that decides the bytes."""

    labels: Path | None = None
    """A CSV with the columns `file` and `label`; the first folder below the source without it."""
    samples_per_shard: int = 10_000
    remaking: Remaking = field(default_factory=Remaking)
    dedup: bool = False
    """Store only the first of files with the same bytes."""
    beside: tuple[str, ...] = ()
    """Extensions of files of the same name to store with each picture."""


def shard_images(
    source: Path,
    out: Path,
    choices: Choices | None = None,
    *,
    workers: int = 0,
    part: Part | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write every picture under `source` into shards at `out`.

    Pictures stand in a fixed pseudo-random order, so that a class-sorted folder does not make class-sorted
    shards, and shard `k` holds the `k`-th `samples_per_shard` of them (fewer where some cannot be read; those
    are listed). So any process can write any shard: the bytes are the same with any number of `workers`
    (processes; 0: threads of this one) and of parts.

    With `part`, writes every `part.count`-th shard only, going on where a killed run of the same part stopped;
    `data.parts.merge` makes the dataset of them, with the fingerprint that it has when written at once. Without
    it, `out` appears when all is well.

    Returns:
        `samples`, `classes`, `shards`, `unreadable` ((file, reason) pairs), and `remade`, `bytes_read`,
        `bytes_stored`, `duplicates` and `disputed` where that was asked for.

    Raises:
        UserError: no such folder, no pictures in it, a CSV that names a missing file, `out` exists.
    """
    choices = choices or Choices()
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give the folder that holds the pictures")
    if part is None:
        check_free(out, overwrite)
    elif overwrite:
        raise UserError("--overwrite and --part do not go together: other parts may be at work; remove OUT first")
    plan = _Plan(source, choices)
    threads = min(8, _cores() + 2) if workers <= 1 else 1
    if part is not None:
        return _write_part(plan, PartFolder(out, plan.description(), part), workers, threads, progress)
    with DatasetWriter(out, "images", choices.samples_per_shard, overwrite) as writer:
        writer.extra = plan.about
        jobs = [plan.job(number, writer.folder, threads) for number in range(plan.shards)]
        done = list(_bar(_run(jobs, workers, out), len(jobs), progress))
        writer.adopt([each.entry for each in done if each.entry is not None])
    return plan.summary(done)


def _write_part(plan: _Plan, folder: PartFolder, workers: int, threads: int, progress: bool) -> dict[str, Any]:
    mine = range(folder.part.number, plan.shards, folder.part.count)
    if folder.done:
        return {"samples": 0, "classes": plan.about["classes"], "shards": 0, "unreadable": [], "already": True}
    records = {number: folder.record(shard_name(number)) for number in mine}
    waiting = [number for number, record in records.items() if record is None]
    for number in waiting:
        folder.clear(shard_name(number))
    jobs = [plan.job(number, folder.out, threads) for number in waiting]
    finished = [ShardDone(**record) for record in records.values() if record is not None]
    for number, done in zip(waiting, _bar(_run(jobs, workers, folder.out), len(jobs), progress), strict=True):
        folder.add(shard_name(number), asdict(done))
        finished.append(done)
    folder.finish()
    return plan.summary(finished) | {"already": False}


class _Plan:
    """Which picture goes into which shard; the same wherever it is worked out."""

    def __init__(self, source: Path, choices: Choices) -> None:
        """Raises `UserError`: see `shard_images`."""
        if choices.samples_per_shard < 1:
            raise UserError(f"a shard cannot hold {choices.samples_per_shard} samples; give a size of at least 1")
        wrong = [name for name in choices.beside if name in _NOT_BESIDE or not name.isalnum()]
        if wrong:
            raise UserError(f"{wrong[0]!r} cannot be stored beside pictures; give extensions such as txt or json")
        self.source, self.choices = source, choices
        files = from_csv(source, choices.labels) if choices.labels else from_folders(source)
        if not files:
            raise UserError(f"{source} holds no pictures ({', '.join(IMAGE_PARTS)})")
        classes = sorted_labels({label for _, label in files if label is not None})
        self._numbers: dict[str | None, int] = {label: number for number, label in enumerate(classes)}
        self.about: dict[str, Any] = {"classes": [printable(name) for name in classes]} | choices.remaking.facts
        self._kept = without_duplicates(source, files) if choices.dedup else None
        self._files = self._kept.files if self._kept else files
        self._keys = unique_keys([path for path, _ in self._files])
        count = len(self._files)
        self._order = np.argsort(hash64(_ORDER_SEED, np.arange(count, dtype=np.int64)), kind="stable")
        self.shards = -(-count // choices.samples_per_shard)

    def description(self) -> dict[str, Any]:
        """All that decides the bytes, for `PartFolder`."""
        digest = hashlib.sha256()
        for path, label in self._files:
            digest.update(f"{path}\n{label}\n".encode("utf-8", "surrogateescape"))
        size, beside = self.choices.samples_per_shard, list(self.choices.beside)
        plan = {"kind": "images", "about": self.about, "shards": self.shards, "samples_per_shard": size}
        return plan | {"beside": beside, "files": digest.hexdigest()}

    def job(self, shard: int, folder: Path, threads: int) -> ShardJob:
        """How to write one shard into `folder`."""
        size = self.choices.samples_per_shard
        pictures = [
            Picture(self._files[place][0], self._keys[place], self._numbers.get(self._files[place][1], -1))
            for place in self._order[shard * size : (shard + 1) * size].tolist()
        ]
        tar = folder / shard_name(shard)
        return ShardJob(tar, self.source, pictures, self.choices.remaking, self.choices.beside, threads)

    def summary(self, done: Sequence[ShardDone]) -> dict[str, Any]:
        """See `shard_images`."""
        entries = [each.entry for each in done if each.entry is not None]
        summary = {
            "samples": sum(entry["samples"] for entry in entries),
            "classes": self.about["classes"],
            "shards": len(entries),
            "unreadable": [tuple(each) for one in done for each in one.unreadable],
        }
        if self.choices.remaking.facts:
            summary |= {name: sum(getattr(each, name) for each in done) for name in _COUNTED} | self.about["remade"]
        if self._kept:
            summary |= {"duplicates": self._kept.duplicates, "disputed": self._kept.disputed}
        return summary


_COUNTED = ("remade", "bytes_read", "bytes_stored")


def _run(jobs: Sequence[ShardJob], workers: int, out: Path) -> Iterator[ShardDone]:
    """The results in order; a few shards ahead of the one waited for are being written."""
    try:
        if workers <= 1 or len(jobs) < 2:
            yield from map(write_shard, jobs)
            return
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        ahead: deque[Future[ShardDone]] = deque()
        pool = ProcessPoolExecutor(min(workers, len(jobs)), context, _begin_worker, (os.getpid(),))
        try:
            for job in jobs:
                ahead.append(pool.submit(write_shard, job))
                if len(ahead) > 2 * workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; make room or choose another disk") from None
    except BrokenProcessPool:
        raise UserError("a worker was killed, perhaps for want of memory; start again with fewer --workers") from None


def _begin_worker(parent: int) -> None:
    """Ctrl-C is for the process that started us, and we end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)


def _bar(done: Iterator[ShardDone], count: int, progress: bool) -> Iterator[ShardDone]:
    return iter(tqdm(done, total=count, desc="sharding", unit="shard", disable=None if progress else True))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
