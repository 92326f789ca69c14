"""The law of saves: whatever goes wrong in one, training goes on from a whole checkpoint to the same bits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from broken_disk import BrokenDisk, Crash
from pretrain_kit import recipe

from data import files
from data.errors import UserError
from pretrain import checkpoint
from pretrain.checkpoint import MANIFEST, Checkpoint, Retention, choose, newest, problem
from pretrain.loop import take_step
from pretrain.recipe import Recipe
from pretrain.saver import Saver
from pretrain.setup import Setup, prepare

STEPS, EVERY = 6, 2


@pytest.fixture(scope="module")
def chosen(digits: Path) -> Recipe:
    return recipe("mae", digits / "train", {"train.ema": 0.9, "train.batch_size": 4, "train.steps": STEPS})


@pytest.fixture(scope="module")
def straight(chosen: Recipe, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of a life that nothing disturbs."""
    return live(chosen, tmp_path_factory.mktemp("straight"))


def live(chosen: Recipe, folder: Path, background: bool = False) -> str:
    """Train from the newest whole checkpoint to the end, saving every other step; returns the hash of the end."""
    setup = prepare(chosen, folder)
    start = choose(folder, "auto")
    if start is not None:
        setup.state.restore(start, setup.recipe, setup.data.facts)
    checkpoint.clear(folder)
    saver = Saver(folder, Retention(2), background=background)
    setup.loader.position = setup.state.position
    batches = iter(setup.loader)
    while setup.state.step < STEPS:
        take_step(setup, batches)
        if setup.state.step % EVERY == 0:
            saver.save(setup.state.step, snapshot_of(setup))
    saver.finish()
    return digest(setup)


def snapshot_of(setup: Setup) -> Checkpoint:
    return setup.state.snapshot(setup.recipe, setup.data.facts)


def digest(setup: Setup) -> str:
    """Of every tensor of the state, and of what JSON holds."""
    snapshot = setup.state.snapshot(setup.recipe, "")
    found = hashlib.sha256(repr(snapshot.state).encode())
    for kind, part in sorted(snapshot.tensors.items()):
        for name, tensor in sorted(part.items()):
            found.update(f"{kind}/{name}".encode())
            found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def test_killed_at_any_operation_of_a_save(
    chosen: Recipe, straight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = prepare(chosen, tmp_path)
    batches = iter(setup.loader)
    for _ in range(2 * EVERY):
        take_step(setup, batches)
        if setup.state.step == EVERY:
            Saver(tmp_path / "0", Retention(1), background=False).save(EVERY, snapshot_of(setup))
    at, broken, resumed = 0, True, []
    while broken:
        at += 1
        folder, disk = tmp_path / str(at), BrokenDisk(at)
        shutil.copytree(tmp_path / "0", folder)
        with monkeypatch.context() as patch, contextlib.suppress(Crash):
            patch.setattr(files, "disk", disk)
            Saver(folder, Retention(1), background=False).save(2 * EVERY, snapshot_of(setup))
        broken = disk.broken
        found = newest(folder, pytest.fail)
        assert found is not None
        resumed.append(checkpoint.step_of(found))
        assert live(chosen, folder) == straight, f"killed at {disk.operations}"
    assert resumed == sorted(resumed)
    assert set(resumed) == {2, 4}
    assert at > 25


@pytest.mark.slow
def test_killed_at_any_operation_of_a_life(
    chosen: Recipe, straight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, broken, resumed = 0, True, set()
    while broken:
        at += 1
        folder, disk = tmp_path / str(at), BrokenDisk(at)
        with monkeypatch.context() as patch, contextlib.suppress(Crash):
            patch.setattr(files, "disk", disk)
            live(chosen, folder, background=True)
        broken = disk.broken
        found = newest(folder, pytest.fail)
        resumed.add(None if found is None else checkpoint.step_of(found))
        assert live(chosen, folder) == straight, f"killed at {disk.operations}"
    assert resumed == {None, 2, 4, 6}
    assert at > 80


@pytest.mark.parametrize("stride", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_changes_nothing_that_is_trained(
    stride: int, chosen: Recipe, straight: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, broken = 1, True
    while broken:
        folder, disk = tmp_path / str(at), BrokenDisk(at, "full", only=("open", "write", "fsync", "mkdir", "rename"))
        with monkeypatch.context() as patch:
            patch.setattr(files, "disk", disk)
            assert live(chosen, folder, background=True) == straight
        broken = disk.broken
        assert live(chosen, folder) == straight, f"full at {disk.operations}"
        at += stride


def damages(path: Path) -> list[bytes]:
    """A file's bytes, cut short and with one bit flipped, at several places."""
    content = path.read_bytes()
    places = sorted({0, 9, len(content) // 3, len(content) // 2, len(content) - 1})
    flipped = [content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :] for place in places]
    return [content[:place] for place in places] + flipped


def test_truncations_and_flipped_bits_in_each_file(chosen: Recipe, straight: str, tmp_path: Path) -> None:
    live(chosen, tmp_path)
    last = tmp_path / "step-000000006"
    seen = 0
    for path in sorted(last.iterdir()):
        content = path.read_bytes()
        for damaged in damages(path):
            path.write_bytes(damaged)
            if problem(last) is None:  # white space, or a letter of a name, in JSON
                assert path.name == MANIFEST
                continue
            seen += 1
            found = newest(tmp_path, lambda _: None)
            assert found is not None
            assert found.name == "step-000000004"
        path.write_bytes(damages(path)[-3])
        assert live(chosen, tmp_path) == straight  # which writes step 6 anew
        assert problem(last) is None
        path.write_bytes(content)
    assert seen > 40


@pytest.mark.parametrize("text", ["step-999999999\n", "", "../../etc\n", "\0\xff"])
def test_latest_is_for_people(chosen: Recipe, straight: str, tmp_path: Path, text: str) -> None:
    live(chosen, tmp_path)
    (tmp_path / "LATEST").write_text(text)
    found = choose(tmp_path, "auto")
    assert found is not None
    assert found.name == "step-000000006"
    (tmp_path / "LATEST").unlink()
    (tmp_path / ".step-000000008.0-1.partial").mkdir()
    (tmp_path / ".step-000000008.0-1.partial" / "model.safetensors").write_text("half")
    (tmp_path / ".LATEST.1.partial").write_text("st")
    (tmp_path / "step-000000004").rename(tmp_path / "mine")
    assert choose(tmp_path, "auto") == found
    assert live(chosen, tmp_path) == straight
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == ".") == []


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[type[Path.touch], tuple[Path]]:
        return (Path.touch, (Path(f"{self.mark}"),))

    def __init__(self, mark: Path) -> None:
        self.mark = mark


def test_a_pickle_in_a_checkpoint_is_not_loaded(chosen: Recipe, straight: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    payload = pickle.dumps(Evil(mark))
    pickle.loads(payload)
    assert mark.exists(), "the pickle is a dangerous one"
    mark.unlink()
    folder = tmp_path / "run"
    live(chosen, folder)
    last = folder / "step-000000006"
    for name in ("model.pt", "optimizer.bin", "random_states_0.pkl", ".metadata", "model-00001-of-00002.safetensors"):
        (last / name).write_bytes(payload)
    assert choose(folder, "auto") == last, "files that the manifest does not name change nothing"
    assert live(chosen, folder) == straight
    # In the place of a file; even where somebody has made the manifest fit.
    for name in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        content, manifest = (last / name).read_bytes(), (last / MANIFEST).read_text()
        (last / name).write_bytes(payload)
        assert "does not match" in str(problem(last)) or "bytes instead of" in str(problem(last))
        facts = checkpoint.read_manifest(last)
        facts[name] = {"bytes": len(payload), "sha256": [hashlib.sha256(payload).hexdigest()]}
        (last / MANIFEST).write_text(json.dumps(facts))
        assert problem(last) is None
        with pytest.raises(UserError, match="step-000000006"):
            live(chosen, folder)
        (last / name).write_bytes(content)
        (last / MANIFEST).write_text(manifest)
    assert not mark.exists()
