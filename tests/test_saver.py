"""Laws of the saver: the loop waits for a copy alone, nothing is shared with it, and processes commit together."""

from __future__ import annotations

import json
import shutil
import threading
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from broken_disk import BrokenDisk, Crash
from torch import Tensor

from data import files
from data.files import Bytes, Disk
from pretrain import saver as saver_module
from pretrain.checkpoint import (
    Checkpoint,
    Retention,
    complete,
    newest,
    problem,
    read_manifest,
    read_state,
    read_tensors,
    step_of,
)
from pretrain.saver import Saver
from pretrain.tensors import CHUNK, Piece, Stored


def made(value: float, rows: int = 6) -> Checkpoint:
    tensors = {
        "weight": torch.full((rows, 3), value),
        "half": torch.full((5,), value).bfloat16(),
        "flag": torch.tensor(True),
        "none": torch.zeros(0, 4),
        "column": torch.arange(12.0).view(3, 4).T + value,
    }
    return Checkpoint({"model": tensors, "optimizer": {"weight::step": torch.tensor(value)}}, {"value": [value]})


def weight(path: Path | None) -> Tensor:
    assert path is not None
    return read_tensors(path, "model").whole("weight")


class SlowDisk(Disk):
    """Waits, before its first write, for somebody to open the gate."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def write(self, file: FileIO, data: Bytes) -> None:
        assert self.gate.wait(20)
        super().write(file, data)


def test_what_changes_after_a_save_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, saver, live = SlowDisk(), Saver(tmp_path, Retention()), made(1.0)
    monkeypatch.setattr(files, "disk", disk)
    saver.save(1, live)  # returns, though nothing is written
    assert complete(tmp_path) == []
    for part in live.tensors.values():
        for tensor in part.values():
            tensor.zero_()
    live.state["value"].append("later")
    disk.gate.set()
    assert saver.finish() is None
    assert saver.last == tmp_path / "step-000000001"
    for kind, part in made(1.0).tensors.items():
        stored = read_tensors(saver.last, kind)
        assert stored.names == part.keys()
        for name, tensor in part.items():
            assert torch.equal(stored.whole(name), tensor)
            assert stored.whole(name).dtype == tensor.dtype
    assert read_state(saver.last) == {"value": [1.0]}


def test_a_save_waits_for_the_one_before_and_uses_its_memory_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, saver = SlowDisk(), Saver(tmp_path, Retention())
    monkeypatch.setattr(files, "disk", disk)
    saver.save(1, made(1.0))
    host = saver._host["model"]
    second = threading.Thread(target=saver.save, args=(2, made(2.0)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    disk.gate.set()
    second.join(20)
    saver.finish()
    assert saver._host["model"] is host
    assert [float(weight(path)[0, 0]) for path in complete(tmp_path)] == [1.0, 2.0]
    saver.save(3, made(3.0, rows=7))  # another layout needs other memory
    saver.finish()
    assert weight(saver.last).shape == (7, 3)


def test_what_is_not_the_disk_s_fault_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, Retention())
    monkeypatch.setattr(files, "disk", BrokenDisk(5))
    saver.save(1, made(1.0))
    with pytest.raises(Crash):
        saver.finish()
    strange = Checkpoint({"model": {"w": torch.zeros(2, dtype=torch.complex128)}}, {})
    with pytest.raises(TypeError, match="complex128"):
        saver.save(2, strange)


def test_space_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, Retention())
    saver.save(1, made(1.0))
    saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        disk = BrokenDisk(1, "full")
        patch.setattr(files, "disk", disk)
        saver.save(2, made(2.0))
        said = saver.finish()
        assert said is not None
        assert "MB are needed, 0 MB are free" in said
        assert "open" not in disk.operations
        assert "mkdir" not in disk.operations
    assert saver.last == tmp_path / "step-000000001"
    saver.save(3, made(3.0))
    assert saver.finish() is None


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Retention(last=2, every=4))
    for step in range(1, 12):
        saver.save(step, made(step))
    saver.finish()
    assert [step_of(path) for path in complete(tmp_path)] == [4, 8, 10, 11]


def test_a_future_that_was_given_up_is_set_aside(tmp_path: Path) -> None:
    saver = Saver(tmp_path, Retention(3))
    for step in (1, 2, 3):
        saver.save(step, made(step))
    saver.finish()
    again = Saver(tmp_path, Retention(3), background=False)  # which went on from step 1
    again.save(2, made(20.0))
    assert float(weight(newest(tmp_path, pytest.fail))[0, 0]) == 20.0
    assert [step_of(path) for path in complete(tmp_path)] == [1, 2]
    assert sorted(path.name for path in tmp_path.glob("abandoned-*")) == [
        "abandoned-step-000000002",
        "abandoned-step-000000003",
    ]
    assert problem(tmp_path / "abandoned-step-000000003") is None


def test_large_files_are_checked_in_parts(tmp_path: Path) -> None:
    big = torch.arange(CHUNK // 4 * 2, dtype=torch.int32)
    saver = Saver(tmp_path, Retention(), background=False)
    saver.save(1, Checkpoint({"model": {"w": big}}, {}))
    assert saver.last is not None
    assert len(read_manifest(saver.last)["model.safetensors"]["sha256"]) == 3
    assert problem(saver.last) is None
    assert torch.equal(read_tensors(saver.last, "model").whole("w"), big)
    with open(saver.last / "model.safetensors", "r+b") as file:
        file.seek(CHUNK + 5)
        byte = file.read(1)[0]
        file.seek(CHUNK + 5)
        file.write(bytes([byte ^ 1]))
    assert problem(saver.last) == "model.safetensors does not match its checksum"


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a snapshot hold pieces as they are; a real process would cut them off its DTensors."""
    plain = saver_module.piece
    monkeypatch.setattr(saver_module, "piece", lambda t: t if isinstance(t, Piece) else plain(t))


def share(rank: int, world: int, value: float) -> Checkpoint:
    """What one process holds of a (5, 2) weight and of a vector that all have."""
    whole = torch.arange(10.0).view(5, 2) + value
    rows = torch.arange(5).chunk(world)
    mine = rows[rank] if rank < len(rows) else rows[0][:0]
    start = int(mine[0]) if len(mine) else 5
    pieces: dict[str, Any] = {"w": Piece(whole[mine], (start, 5)), "all": torch.ones(3) * value}
    return Checkpoint({"model": pieces}, {"value": value})


def savers(folder: Path, world: int, **options: Any) -> list[Saver]:
    return [Saver(folder, Retention(2), rank, world, "life", **options) for rank in range(world)]


def save_all(everyone: list[Saver], step: int) -> list[str | None]:
    for saver in reversed(everyone):
        saver.save(step, share(saver.rank, len(everyone), float(step)))
    return [saver.finish() for saver in everyone]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_pieces_of_any_number_of_processes_make_one_checkpoint(world: int, cut: None, tmp_path: Path) -> None:
    everyone = savers(tmp_path, world)
    for step in (1, 2, 3):
        assert save_all(everyone, step) == [None] * world
    assert [step_of(path) for path in complete(tmp_path)] == [2, 3]
    assert everyone[0].last == newest(tmp_path, pytest.fail)
    path = tmp_path / "step-000000003"
    stored, whole = read_tensors(path, "model"), torch.arange(10.0).view(5, 2) + 3.0
    assert stored.shape("w") == (5, 2)
    assert torch.equal(stored.whole("w"), whole)
    assert torch.equal(stored.whole("all"), torch.ones(3) * 3)
    for start in range(6):
        for count in range(6 - start):
            assert torch.equal(stored.rows("w", start, count), whole[start : start + count])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-000000002", "step-000000003"]
    assert len([name for name in read_manifest(path) if name.startswith("model")]) == world
    assert {p.name for p in path.iterdir()} == {*read_manifest(path), "manifest.json"}


def test_the_file_of_a_process_that_is_missing_is_noticed(cut: None, tmp_path: Path) -> None:
    everyone = savers(tmp_path, 2)
    save_all(everyone, 1)
    save_all(everyone, 2)
    (tmp_path / "step-000000002" / "model-00002-of-00002.safetensors").unlink()
    said: list[str] = []
    found = newest(tmp_path, said.append)
    assert found is not None
    assert found.name == "step-000000001"
    assert "model-00002-of-00002.safetensors is missing" in said[0]


def test_a_process_that_cannot_write_is_named_and_nothing_is_committed(
    cut: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everyone = savers(tmp_path, 2, patience=20.0)
    assert save_all(everyone, 1) == [None, None]
    write = saver_module.checkpoint.write_file

    def failing(path: Path, chunks: Any) -> Any:
        if "00002-of" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, chunks)

    with monkeypatch.context() as patch:
        patch.setattr(saver_module.checkpoint, "write_file", failing)
        first, second = save_all(everyone, 2)
    assert first is not None
    assert second is not None
    assert "process 1: " in first
    assert "No space left" in first
    assert [step_of(path) for path in complete(tmp_path)] == [1]
    assert save_all(everyone, 3) == [None, None]
    assert [step_of(path) for path in complete(tmp_path)] == [1, 3]
    assert list(tmp_path.glob(".*")) == []


def test_a_process_that_is_gone_is_not_waited_for_for_ever(cut: None, tmp_path: Path) -> None:
    main = savers(tmp_path, 2, patience=0.1)[0]
    main.save(1, share(0, 2, 1.0))
    assert "process 1 has not written its part" in str(main.finish())
    assert complete(tmp_path) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_killed_at_any_operation(
    rank: int, cut: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, broken = 0, True
    while broken:
        at += 1
        folder = tmp_path / str(at)
        save_all(savers(folder, 2), 1)
        main, other = savers(folder, 2, background=False, patience=0.0)
        disk = BrokenDisk(at)
        # One after the other in one thread: the second, so that the main one finds its part.
        for saver in (other, main):
            with monkeypatch.context() as patch:
                if saver.rank == rank:
                    patch.setattr(files, "disk", disk)
                try:
                    saver.save(2, share(saver.rank, 2, 2.0))
                except Crash:
                    assert saver.rank == rank
        broken = disk.broken
        found = newest(folder, pytest.fail)
        assert found is not None
        assert all(problem(path) is None for path in complete(folder))
        value = read_state(found)["value"]
        assert torch.equal(read_tensors(found, "model").whole("w"), torch.arange(10.0).view(5, 2) + value)
        assert value == 2.0 or broken
        assert save_all(savers(folder, 2), 3) == [None, None]
        assert step_of(newest(folder, pytest.fail) or Path()) == 3
    assert at > (18 if rank == 0 else 6)


def test_safetensors_itself_reads_what_is_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saver = Saver(tmp_path, Retention(), background=False)
    saver.save(1, made(4.0))
    assert saver.last is not None
    theirs = load_file(saver.last / "model.safetensors")
    ours = made(4.0).tensors["model"]
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    save_file({name: tensor.contiguous() for name, tensor in ours.items()}, tmp_path / "theirs.safetensors")
    assert torch.equal(Stored([tmp_path / "theirs.safetensors"]).whole("column"), ours["column"])
    assert json.loads((saver.last / "state.json").read_text()) == {"value": [4.0]}


@pytest.mark.gpu
def test_a_save_from_a_gpu_goes_through_page_locked_memory_and_is_not_moved_by_later_steps(tmp_path: Path) -> None:
    live = torch.arange(2.0**22, device="cuda")
    saver = Saver(tmp_path, Retention())
    for step in (1, 2, 3):
        live.mul_(2.0)
        saver.save(step, Checkpoint({"model": {"w": live}}, {}))
        live.add_(1.0).sub_(1.0)  # queued behind the copy, but what is saved stands
        expected = torch.arange(2.0**22) * 2.0**step
        assert saver.finish() is None
        assert saver._host["model"]._bytes.is_pinned()
        assert saver.last is not None
        assert torch.equal(read_tensors(saver.last, "model").whole("w"), expected)
