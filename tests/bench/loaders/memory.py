"""Memory over an epoch and over a million index entries; what a killed loader leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import multiprocessing as mp

from data.dataset import ShardedDataset
from data.encoded import EncodedLoader
from data.index import ShardIndex, checksum, join_keys
from data.loader import Loader
from data.shards import FORMAT, MANIFEST, fingerprint
from loaders.elastic import nothing
from loaders.sets import Pictures

ENTRIES, SHARDS, SAMPLE = 1_000_000, 100, 2_000


def report(pictures: Pictures, work: Path) -> str:
    """Resident memory of fresh processes that read, and what is left after SIGKILL."""
    synthetic = work / "million"
    if not synthetic.exists():
        write_synthetic(synthetic)
    epoch = _in_child(_growth, pictures.shards, 3)
    million = _in_child(_growth, synthetic, 1)
    disk = sum(path.stat().st_size for path in synthetic.glob("*.index")) / ENTRIES
    lines = [
        f"- CIFAR-10, three epochs of 50,000: resident memory grows by {epoch:+.1f} MiB after the first tenth.",
        f"- {ENTRIES:,} index entries in {SHARDS} shards (sparse tars of zeros), one epoch read and checked: "
        f"{million:+.1f} MiB after the first tenth.",
        f"- An index entry takes 32 bytes in memory (at most 2**22 of them), {disk:.1f} on disk with its key.",
        f"- {_after_kill(pictures)}",
    ]
    return "\n".join(lines)


def write_synthetic(out: Path) -> None:
    """A dataset of a million samples of zeros: real indexes, tars without blocks on disk."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count = ENTRIES // SHARDS
    padded = -(-SAMPLE // 512) * 512 + 512
    shards = []
    for number in range(SHARDS):
        tar = partial / f"shard-{number:06d}.tar"
        with open(tar, "wb") as file:
            file.truncate(count * padded + 1024)
        ShardIndex(
            parts=["jpg"],
            offsets=(np.arange(count, dtype=np.int64) * padded + 512)[:, None],
            sizes=np.full((count, 1), SAMPLE, dtype=np.int64),
            labels=np.zeros(count, dtype=np.int64),
            checksums=np.full((count, 1), checksum(bytes(SAMPLE)), dtype=np.uint32),
            names=join_keys(f"{number:06d}/{member:06d}" for member in range(count)),
            tar_bytes=tar.stat().st_size,
        ).save(tar.with_suffix(".index"))
        shards.append({"name": tar.name, "samples": count, "bytes": tar.stat().st_size})
    about = {"kind": "images"}
    manifest = {"format": FORMAT, "fingerprint": fingerprint(shards, about), "shards": shards} | about
    (partial / MANIFEST).write_text(json.dumps(manifest))
    partial.rename(out)


def _growth(shards: Path, epochs: int) -> float:
    """MiB by which the most resident memory of the last nine tenths exceeds that of the first tenth."""
    dataset = ShardedDataset(shards)
    batches = iter(EncodedLoader(dataset, 256))
    count = epochs * len(dataset) // 256
    resident = []
    for number in range(count):
        next(batches)
        if number % 50 == 0:
            resident.append(_resident())
    first = max(1, len(resident) // 10)
    return (max(resident[first:]) - max(resident[:first])) / 2**20


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _in_child(function: Any, *arguments: Any) -> Any:
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _after_kill(pictures: Pictures) -> str:
    """Kill a process that reads with two workers, and look for what stays."""
    before = set(os.listdir("/dev/shm"))
    code = f"from loaders.memory import read_for_ever; read_for_ever({str(pictures.shards.resolve())!r})"
    home = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        workers = json.loads(process.stdout.readline())
        time.sleep(0.5)
        process.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(_alive, workers)):
        time.sleep(0.1)
    seconds = 20 - (deadline - time.monotonic())
    alive = sum(map(_alive, workers))
    segments = len(set(os.listdir("/dev/shm")) - before)
    return (
        f"After SIGKILL of a process with {len(workers)} workers: {alive} workers alive after {seconds:.1f} s (so no "
        f"file descriptors), {segments} shared-memory segments left."
    )


def read_for_ever(shards: str) -> None:
    """Read with two workers, whose process ids are printed, until killed."""
    batches = iter(Loader(ShardedDataset(shards), 256, workers=2, decode=nothing))
    next(islice(batches, 5, None))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    print(json.dumps([int(child) for child in children]), flush=True)
    for _ in batches:
        pass


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
