"""Saving while training goes on: the loop waits for a copy into host memory, a thread does the rest."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from data import files
from data.files import sync, write_atomically
from pretrain import checkpoint
from pretrain.accelerator import on_main
from pretrain.checkpoint import STATE, Checkpoint, Facts, Retention, checkpoint_name
from pretrain.recipe import WatchConfig
from pretrain.sharding import piece
from pretrain.tensors import HostFile, Piece, layout

MARGIN = 16 * 2**20
"""Bytes that a save leaves free on the disk."""


class Saver:
    """Writes a run's checkpoints one after the other in a background thread.

    Every process calls every method at the same steps. Where nothing is sharded the main process alone writes;
    sharded tensors are written by each process for its own part, and the main one commits when all have.
    """

    def __init__(
        self,
        folder: Path,
        retention: Retention,
        rank: int = 0,
        world_size: int = 1,
        life: str | None = None,
        background: bool = True,
        patience: float = 600.0,
    ) -> None:
        """For checkpoints in `folder`.

        Args:
            life: a name of this run of the program, the same on all processes and never used before.
            background: without it `save` returns when all is written.
            patience: seconds that the main process waits for the others' parts.
        """
        self.folder, self.retention, self.rank, self.world_size = folder, retention, rank, world_size
        self.life = secrets.token_hex(4) if life is None else life
        self.background, self.patience = background, patience
        self.problem: str | None = None
        """Why the last save that ended wrote nothing; None when it went well. The main process knows."""
        self.last: Path | None = None
        """The newest whole checkpoint that is known: where the run started, or what was committed since."""
        self.blocked = 0.0
        """Seconds that the last `save` held up its caller."""
        self.took = 0.0
        """Seconds from the call of the last save that has ended until it was on the disk."""
        self.seconds = 0.0
        """The longest that a save has taken from its begin until it was whole on disk."""
        self._count, self._began = 0, 0.0
        self._host: dict[str, HostFile] = {}
        self._thread: threading.Thread | None = None
        self._raised: BaseException | None = None

    def save(self, step: int, snapshot: Checkpoint) -> None:
        """Take a copy of `snapshot` and write it as the checkpoint of `step`; waits for the save before.

        A full or failing disk raises nothing: `problem` says what happened, and older checkpoints stay.
        """
        began = time.monotonic()
        self.finish()
        self._count, self._began = self._count + 1, time.monotonic()
        pieces = {kind: self._mine(tensors) for kind, tensors in snapshot.tensors.items()}
        sharded = any(p.rows is not None for part in pieces.values() for p in part.values())
        if self.rank == 0 or sharded:
            self._copy({kind: part for kind, part in pieces.items() if part})
            # Now, not in the thread: the loop goes on to change what the state refers to.
            state = json.dumps(snapshot.state, indent=1)
            self._start(step, state, sharded)
        self.blocked = time.monotonic() - began

    def finish(self) -> str | None:
        """Wait for the save under way; returns `problem`. Raises what the thread met, unless it was the disk's."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._raised is not None:
            raised, self._raised = self._raised, None
            raise raised
        return self.problem

    def _mine(self, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
        """This process's pieces: of sharded tensors its rows, of whole ones everything or, but on rank 0, nothing."""
        pieces = {name: piece(tensor) for name, tensor in tensors.items()}
        if self.rank == 0:
            return pieces
        return {name: p for name, p in pieces.items() if p.rows is not None}

    def _copy(self, pieces: dict[str, dict[str, Piece]]) -> None:
        """Into host memory that nothing else refers to, the same at every save."""
        cuda = False
        for kind, part in pieces.items():
            on_gpu = any(p.tensor.is_cuda for p in part.values())
            if kind not in self._host or self._host[kind].layout != layout(part):
                self._host[kind] = HostFile(part, pin=on_gpu)
            self._host[kind].copy(part)
            cuda = cuda or on_gpu
        self._host = {kind: self._host[kind] for kind in pieces}
        if cuda:
            torch.cuda.current_stream().synchronize()

    def _start(self, step: int, state: str, sharded: bool) -> None:
        arguments = (checkpoint_name(step), state, sharded)
        if self.background:
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(*arguments)

    def _write(self, name: str, state: str, sharded: bool) -> None:
        partial = self.folder / f".{name}.{self.life}-{self._count}.partial"
        try:
            written = self._write_files(partial, state, sharded)
            if self.rank == 0:
                self.last = checkpoint.commit(partial, name, dict(sorted(written.items())))
            self.problem, self.took = None, time.monotonic() - self._began
            self._tidy(name)
            self.seconds = max(self.seconds, time.monotonic() - self._began)
        except (OSError, SafetensorError) as error:
            self.problem = f"checkpoint {self.folder / name} cannot be written ({error})"
            self._give_up(partial, sharded)
        except BaseException as error:
            if not self.background:
                raise
            self._raised = error

    def _write_files(self, partial: Path, state: str, sharded: bool) -> dict[str, Facts]:
        """This process's files; returns their facts."""
        for folder in (*reversed([p for p in self.folder.parents if not p.exists()]), self.folder):
            if not folder.exists():
                files.disk.mkdir(folder)
                sync(folder.parent)
        needed = sum(map(len, self._host.values())) * (self.world_size if sharded else 1) + len(state) + MARGIN
        free = shutil.disk_usage(self.folder).free
        if self.rank == 0 and free < needed:
            raise OSError(f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")
        files.disk.mkdir(partial)
        written = {}
        suffix = f"-{self.rank + 1:05d}-of-{self.world_size:05d}" if sharded else ""
        for kind, host in self._host.items():
            file = f"{kind}{suffix}.safetensors"
            written[file] = checkpoint.write_file(partial / file, host.chunks())
        if self.rank == 0:
            written[STATE] = checkpoint.write_file(partial / STATE, [state.encode()])
        else:
            sync(partial)
            write_atomically(self._part(partial, self.rank), json.dumps({"files": written}))
        if self.rank == 0 and sharded:
            for rank in range(1, self.world_size):
                written |= self._await(partial, rank)
        return written

    def _await(self, partial: Path, rank: int) -> dict[str, Facts]:
        """What another process says it has written, when it says so; raises `OSError` when it could not."""
        path, deadline = self._part(partial, rank), time.monotonic() + self.patience
        while not path.exists():
            if time.monotonic() > deadline:
                raise OSError(f"process {rank} has not written its part in {self.patience:.0f} seconds")
            time.sleep(0.02)
        said: dict[str, Any] = json.loads(path.read_text())
        if "problem" in said:
            raise OSError(f"process {rank}: {said['problem']}")
        files.disk.unlink(path)
        found: dict[str, Facts] = said["files"]
        return found

    def _tidy(self, name: str) -> None:
        try:
            if self.rank == 0:
                checkpoint.tidy(self.folder, name, self.retention, self._under_way)
        except OSError as error:
            self.problem = f"{self.folder} holds {name}, but older checkpoints cannot be removed ({error})"

    def _under_way(self, hidden: str) -> bool:
        """Whether a hidden folder is of a later save of this life, which another process may have begun."""
        life, _, count = hidden.removesuffix(".partial").rpartition(".")[2].rpartition("-")
        return life == self.life and count.isdigit() and int(count) > self._count

    def _give_up(self, partial: Path, sharded: bool) -> None:
        """Make room again, and let the main process know; a disk that fails here too changes nothing."""
        with contextlib.suppress(OSError):
            if self.rank == 0 and not sharded:
                files.remove_folder(partial)
            elif self.rank != 0:
                for path in partial.glob(f"*-{self.rank + 1:05d}-of-*"):
                    files.disk.unlink(path)
                write_atomically(self._part(partial, self.rank), json.dumps({"problem": self.problem}))

    @staticmethod
    def _part(partial: Path, rank: int) -> Path:
        return partial / f"part-{rank + 1:05d}.json"


@contextlib.contextmanager
def saving(accelerator: Accelerator, folder: Path, watch: WatchConfig, start: Path | None) -> Iterator[Saver]:
    """A saver for the block, on all processes; what crashes left in `folder` is removed first.

    However the block ends, the save under way is written to its end.
    """

    def begin() -> str:
        checkpoint.clear(folder)
        return secrets.token_hex(4)

    life = on_main(accelerator, begin)
    retention = Retention(watch.checkpoint_keep, watch.checkpoint_keep_every)
    saver = Saver(folder, retention, accelerator.process_index, accelerator.num_processes, life)
    saver.last = start
    try:
        yield saver
    finally:
        saver.finish()
