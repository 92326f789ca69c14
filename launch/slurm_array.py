"""`headwater launch shard`: a SLURM array that writes a dataset in parts, and a job behind it that joins them.

A part that is done is passed over when its job is requeued or submitted again, so an array may be submitted until
all of it is through.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.errors import UserError
from data.files import write_atomically
from launch.slurm import TIME


@dataclass(frozen=True)
class Array:
    """What is asked of SLURM."""

    out: Path
    """The dataset to write, on a file system that all nodes share."""
    words: Sequence[str]
    """What follows `headwater shard`: the kind, sources, OUT and options, without --part and --workers."""
    parts: int
    cpus: int = 8
    """CPU cores of each part, and its workers."""
    time: str = "12:00:00"
    """Time limit of each part."""
    setup: Sequence[str] = ()
    """Shell lines before each job's work."""
    options: Sequence[str] = ()
    """More words for sbatch."""
    python: str = field(default_factory=lambda: sys.executable)

    @property
    def folder(self) -> Path:
        """Of scripts and logs: beside the dataset, which is no place for them."""
        return self.out.parent / f"{self.out.name}.slurm"


def scripts(array: Array) -> dict[str, str]:
    """The scripts by file name: the parts, and the merge.

    Raises:
        UserError: no parts or no cores, or a time that sbatch would not read.
    """
    if array.parts < 1 or array.cpus < 1:
        raise UserError(f"--parts {array.parts} and --cpus {array.cpus}: at least 1 of each is needed")
    if not TIME.fullmatch(array.time):
        raise UserError(f"--time {array.time!r} is no time limit; write [days-]hours:minutes:seconds, such as 12:00:00")
    asked = {
        "job-name": f"shard-{array.out.name}",
        "array": f"0-{array.parts - 1}",
        "cpus-per-task": array.cpus,
        "time": array.time,
        "requeue": None,
        "output": array.folder / "part-%a.log",
    }
    work = [array.python, "-m", "launch.cli", "shard", *array.words, "--workers", str(array.cpus)]
    part = f'{shlex.join(work)} --part "$SLURM_ARRAY_TASK_ID/{array.parts}"'
    merge = shlex.join([array.python, "-m", "launch.cli", "shard", "merge", str(array.out)])
    joined = {"job-name": f"merge-{array.out.name}", "time": array.time, "output": array.folder / "merge.log"}
    return {"parts.sh": _script(array, asked, part), "merge.sh": _script(array, joined, merge)}


def write(array: Array) -> Path:
    """Write the scripts; returns their folder."""
    texts = scripts(array)
    try:
        array.folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomically(array.folder / name, text)
            (array.folder / name).chmod(0o755)
    except OSError as error:
        raise UserError(f"{array.folder} cannot be written ({error.strerror}); choose another OUT") from None
    return array.folder


def submit(folder: Path) -> tuple[int, int]:
    """Submit the parts, and the merge for when all of them have succeeded; returns both jobs' numbers.

    Raises:
        UserError: there is no SLURM here, or it refuses a job, in its own words.
    """
    if shutil.which("sbatch") is None:
        raise UserError(f"there is no sbatch on this machine; {folder} is written: submit parts.sh where SLURM is")
    parts = _sbatch(str(folder / "parts.sh"))
    return parts, _sbatch(f"--dependency=afterok:{parts}", "--kill-on-invalid-dep=yes", str(folder / "merge.sh"))


def _script(array: Array, asked: dict[str, object], command: str) -> str:
    lines = [f"#SBATCH --{name}" + ("" if value is None else f"={value}") for name, value in asked.items()]
    lines += [f"#SBATCH {option}" for option in array.options]
    home = shlex.quote(str(Path(__file__).resolve().parent.parent))
    path = f"export PYTHONPATH={home}${{PYTHONPATH:+:$PYTHONPATH}}"
    return "\n".join(["#!/usr/bin/env bash", *lines, "set -euo pipefail", path, *array.setup, command]) + "\n"


def _sbatch(*words: str) -> int:
    done = subprocess.run(["sbatch", "--parsable", *words], capture_output=True, text=True)
    found = re.match(r"\d+", done.stdout)
    if done.returncode or not found:
        raise UserError(f"sbatch refuses {words[-1]}: {' '.join(done.stderr.split())}")
    return int(found[0])
