"""Laws of checkpoints: whole or not there, believed only after checking, and nothing in them runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_disk import BrokenDisk, Crash
from pretrain_kit import recipe
from torch import Tensor

from data import files
from data.errors import UserError
from pretrain import checkpoint
from pretrain.checkpoint import Checkpoint, Retention, choose, newest, problem, read_state
from pretrain.loop import take_step, train
from pretrain.run import RunFolder, read_metrics
from pretrain.saver import Saver
from pretrain.setup import Setup, prepare


def made(step: int) -> Checkpoint:
    """A small checkpoint that tells which step it is of."""
    tensors = {"w": torch.full((3, 2), float(step)), "n": torch.tensor(step), "b": torch.arange(5).bfloat16()}
    return Checkpoint({"model": tensors, "optimizer": {"w::exp_avg": torch.randn(3, 2)}}, {"step": step})


def write(folder: Path, step: int, snapshot: Checkpoint, keep: int = 3, every: int = 0) -> Path:
    """Save at once, in this thread."""
    saver = Saver(folder, Retention(keep, every), background=False)
    saver.save(step, snapshot)
    assert saver.problem is None
    assert saver.last is not None
    return saver.last


def save(folder: Path, step: int, keep: int = 3) -> Path:
    return write(folder, step, made(step), keep)


def step_of(path: Path | None) -> int | None:
    return None if path is None else int(read_state(path)["step"])


def ignore(_: str) -> None:
    pass


def trained(digits: Path, folder: Path, steps: int) -> Setup:
    """A run's parts after some steps, with everything that a checkpoint may hold."""
    torch.manual_seed(steps)
    setup = prepare(recipe("mae", digits / "train", {"train.ema": 0.9}), folder)
    batches = iter(setup.loader)
    for _ in range(steps):
        take_step(setup, batches)
    return setup


def all_tensors(setup: Setup) -> dict[str, Tensor]:
    snapshot = setup.state.snapshot(setup.recipe, "")
    return {f"{kind}/{name}": t.clone() for kind, part in snapshot.tensors.items() for name, t in part.items()}


def test_a_training_state_returns_bit_for_bit(digits: Path, tmp_path: Path) -> None:
    setup = trained(digits, tmp_path, 3)
    before = all_tensors(setup)
    assert {name.partition("/")[0] for name in before} == {"model", "optimizer", "ema"}
    path = write(tmp_path, 3, setup.state.snapshot(setup.recipe, "f"))
    fresh = trained(digits, tmp_path, 0)
    assert not torch.equal(all_tensors(fresh)["model/decoder_head.weight"], before["model/decoder_head.weight"])
    fresh.state.restore(path, fresh.recipe, "f")
    after = all_tensors(fresh)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype for name in before)
    assert (fresh.state.step, fresh.state.position, fresh.state.skipped) == (3, 48, 0)


def test_nothing_in_a_checkpoint_runs(digits: Path, tmp_path: Path) -> None:
    setup = trained(digits, tmp_path, 1)
    path = write(tmp_path, 1, setup.state.snapshot(setup.recipe, "f"))
    names = sorted(file.name for file in path.iterdir())
    assert names == ["ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    for file in path.iterdir():
        start = file.read_bytes()[:10]
        assert not start.startswith((b"\x80", b"PK"))  # a pickle, torch's zip of pickles
        assert start[:1] == b"{" or start[8:9] == b"{"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objective.mask_ratio": 0.5}, "objective.mask_ratio: 0.75 -> 0.5"),
        ({"optimizer.lr": 0.5}, "optimizer.lr: 0.002 -> 0.5"),
        ({"data.validation": 0.1}, "data.validation: None -> 0.1"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(
    digits: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    setup = trained(digits, tmp_path, 0)
    path = write(tmp_path, 0, setup.state.snapshot(setup.recipe, "f"))
    with pytest.raises(UserError) as caught:
        setup.state.restore(path, recipe("mae", digits / "train", change | {"train.ema": 0.9}), "f")
    assert words in str(caught.value)


def test_other_data_are_refused_with_the_difference(digits: Path, tmp_path: Path) -> None:
    setup = trained(digits, tmp_path, 0)
    now = setup.data.facts
    path = write(tmp_path, 0, setup.state.snapshot(setup.recipe, now))
    other = prepare(recipe("mae", digits / "test", {"train.ema": 0.9}), tmp_path).data.facts
    with pytest.raises(UserError, match=f"other data .*data.train.samples: {now['samples']} -> {other['samples']}"):
        setup.state.restore(path, setup.recipe, other)
    with pytest.raises(UserError, match=r"data\.train\.fingerprint: "):
        setup.state.restore(path, setup.recipe, now | {"fingerprint": "0"})
    setup.state.restore(path, setup.recipe, now)


def test_keep_is_respected(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
        assert (tmp_path / "LATEST").read_text() == f"step-{step:09d}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-000000004", "step-000000005"]


def test_going_on_from_an_older_one_keeps_what_is_new(tmp_path: Path) -> None:
    for step in (1, 5, 6):
        save(tmp_path, step)
    for step in (5, 6):
        (tmp_path / f"step-{step:09d}" / "state.json").write_text("{")
    assert step_of(newest(tmp_path, ignore)) == 1
    save(tmp_path, 2, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-000000001", "step-000000002"]
    assert step_of(newest(tmp_path, ignore)) == 2


def test_a_checkpoint_of_the_same_step_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    truncate(path / "model.safetensors")
    (path / "other.safetensors").write_text("left over")
    save(tmp_path, 1)
    assert problem(path) is None
    assert not (path / "other.safetensors").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", path.name]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "first bit": lambda path: flip(path, 0.0),
    "middle bit": flip,
    "last bit": lambda path: flip(path, 1.0),
    "missing": Path.unlink,
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    said: list[str] = []
    DAMAGES[damage](tmp_path / "step-000000002" / name)
    assert step_of(choose(tmp_path, "auto", said.append)) == 1
    assert len(said) == 1
    assert "step-000000002" in said[0]
    with pytest.raises(UserError, match="step-000000002"):
        choose(tmp_path, str(tmp_path / "step-000000002"))
    DAMAGES[damage](tmp_path / "step-000000001" / name)
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        choose(tmp_path, "auto")


def test_every_flipped_byte_of_the_manifest_is_harmless_or_seen(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = (path / "manifest.json").read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 4
        (path / "manifest.json").write_bytes(bytes(changed))
        if problem(path) is None:
            assert step_of(path) == 1
            assert {file.name for file in path.glob("*.*")} >= {"model.safetensors", "state.json"}
    (path / "manifest.json").write_bytes(content)
    assert problem(path) is None


def test_where_a_run_goes_on(tmp_path: Path) -> None:
    assert choose(tmp_path / "none", "auto") is None
    assert choose(tmp_path / "none", "never") is None
    path = save(tmp_path, 1)
    assert choose(tmp_path / "none", str(path)) == path
    with pytest.raises(UserError, match="already holds checkpoints"):
        choose(tmp_path, "never")
    with pytest.raises(UserError, match=r"cannot be used: manifest\.json cannot be read"):
        choose(tmp_path, str(tmp_path / "nowhere"))


def visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]


def test_a_crash_anywhere_in_a_save_leaves_a_whole_newest_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, broken = 0, True
    while broken:
        at += 1
        folder = tmp_path / str(at)
        save(folder, 1, keep=1)
        disk = BrokenDisk(at)
        with monkeypatch.context() as patch, contextlib.suppress(Crash):
            patch.setattr(files, "disk", disk)
            save(folder, 2, keep=1)
        broken = disk.broken
        said: list[str] = []
        found = step_of(newest(folder, said.append))
        assert found in (1, 2), f"crash at {disk.operations}"
        assert found == 2 or broken
        assert not said, f"a half checkpoint is visible after a crash at {disk.operations}: {said}"
        assert all(problem(path) is None for path in visible(folder)), f"crash at {disk.operations}"
        # The next save clears whatever the crash left.
        save(folder, 3, keep=1)
        assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-000000003"]
    assert {"open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"} == set(disk.operations)
    assert at > 25


def test_a_disk_full_at_any_write_is_one_sentence_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, broken = 0, True
    while broken:
        at += 1
        folder = tmp_path / str(at)
        save(folder, 1, keep=1)
        disk = BrokenDisk(at, "full", only=("open", "write", "fsync", "mkdir", "rename"))
        saver = Saver(folder, Retention(1))
        with monkeypatch.context() as patch:
            patch.setattr(files, "disk", disk)
            saver.save(2, made(2))
            said = saver.finish()
        broken = disk.broken
        assert broken == (said is not None)
        assert said is None or "No space left on device" in said
        assert step_of(newest(folder, ignore)) in ((2,) if saver.last is not None else (1, 2))
        assert len(list(folder.glob(".*.partial"))) <= 1, "a failed save makes room again"
        # The same saver goes on once there is room.
        saver.save(3, made(3))
        assert saver.finish() is None
        assert sorted(path.name for path in folder.iterdir()) == ["LATEST", "step-000000003"]
    assert at > 15


class Counting(torch.optim.SGD):
    """An optimiser that counts in its groups, as schedule-free ones do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["counted"] = group.get("counted", 0) + 1
        return super().step(closure)


def test_what_no_library_would_save_returns_too(digits: Path, tmp_path: Path) -> None:
    setup = trained(digits, tmp_path, 1)
    state, objective = setup.state, setup.state.objective
    state.optimizer = Counting(objective.parameters(), lr=0.5, momentum=0.9)
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    objective.register_buffer("queue", torch.arange(6.0), persistent=False)
    objective.register_buffer("grown", torch.arange(9), persistent=False)
    state.extra = {"spikes": {"window": [0.1, 2.0, 1e-300], "until": None}, "ranges": [[64, 128]], "best": 0.1 + 0.2}
    path = write(tmp_path, 1, state.snapshot(setup.recipe, {}))
    state.extra["spikes"]["window"].append(3.0)
    fresh = trained(digits, tmp_path, 0)
    fresh.state.optimizer = Counting(fresh.state.objective.parameters(), lr=0.1, momentum=0.9)
    fresh.state.objective.register_buffer("queue", torch.zeros(6), persistent=False)
    queue = fresh.state.objective.get_buffer("queue")
    fresh.state.restore(path, fresh.recipe, {})
    assert fresh.state.objective.get_buffer("queue") is queue, "what others refer to stays the same tensor"
    assert torch.equal(queue, torch.arange(6.0))
    assert torch.equal(fresh.state.objective.get_buffer("grown"), torch.arange(9))
    assert "grown" not in fresh.state.objective.state_dict()
    assert fresh.state.optimizer.param_groups[0]["counted"] == 1
    assert fresh.state.optimizer.param_groups[0]["lr"] == 0.5
    assert fresh.state.extra == {
        "spikes": {"window": [0.1, 2.0, 1e-300], "until": None},
        "ranges": [[64, 128]],
        "best": 0.1 + 0.2,
    }


def test_a_model_of_another_shape_is_refused_in_one_sentence(digits: Path, tmp_path: Path) -> None:
    setup = trained(digits, tmp_path, 1)
    path = write(tmp_path, 1, setup.state.snapshot(setup.recipe, {}))
    other = recipe("mae", digits / "train", {"train.ema": 0.9, "objective.decoder_width": 32})
    fresh = prepare(other, tmp_path)
    with pytest.raises(UserError, match=r"does not fit this version's model \(.* in the checkpoint, .* here\)"):
        fresh.state.restore(path, setup.recipe, {})


def test_a_run_on_a_full_disk_goes_on_and_says_so(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = checkpoint.write_file
    said: list[dict[str, Any]] = []

    def full(path: Path, chunks: Any) -> Any:
        if ".step-000000004." in str(path):
            raise OSError(28, "No space left on device")
        return written(path, chunks)

    def status(self: RunFolder, state: str, **facts: Any) -> None:
        said.append(facts)

    monkeypatch.setattr(checkpoint, "write_file", full)
    monkeypatch.setattr(RunFolder, "status", status)
    train(recipe("mae", digits / "train", {"train.steps": 8, "watch.checkpoint_every": 2}), tmp_path / "run")
    assert "step-000000004 cannot be written ([Errno 28] No space left on device)" in capsys.readouterr().err
    assert any("No space left" in str(facts.get("problem")) for facts in said)
    assert [path.name for path in checkpoint.complete(tmp_path / "run" / "checkpoints")] == [
        "step-000000006",
        "step-000000008",
    ]
    monkeypatch.setattr(checkpoint, "write_file", lambda *_: full(Path("/.step-000000004."), []))
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        train(recipe("mae", digits / "train", {"train.steps": 2}), tmp_path / "other")


def test_a_disk_that_is_full_for_a_while_costs_no_line_and_no_bit(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = recipe("mae", digits / "train", {"train.steps": 12, "watch.checkpoint_every": 2})
    train(chosen, tmp_path / "straight")
    capsys.readouterr()
    disk = BrokenDisk(22, "full", only=("write",), count=12)
    monkeypatch.setattr(files, "disk", disk)
    train(chosen, tmp_path / "full")
    assert "No space left on device); the run goes on" in capsys.readouterr().err
    assert len(disk.operations) > 34
    lines = [[(line["step"], line.get("loss")) for line in read_metrics(tmp_path / n)] for n in ("straight", "full")]
    assert lines[0] == lines[1]
    last = [tmp_path / name / "checkpoints" / "step-000000012" / "model.safetensors" for name in ("straight", "full")]
    assert last[0].read_bytes() == last[1].read_bytes()
