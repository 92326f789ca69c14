"""Laws of bad input: one sentence that names it, exit status 2, nothing half-written; NaN changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from pretrain_kit import recipe, run, write_recipe
from torch import Tensor, nn

from data.dataset import ShardedDataset
from data.loader import Loader
from launch.cli import main
from pretrain import loop
from pretrain.loop import take_step
from pretrain.objectives.protocol import Output
from pretrain.setup import prepare

Capture = pytest.CaptureFixture[str]


def refused(words: list[str | Path], capsys: Capture) -> str:
    """The one sentence of a command that exits with status 2."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    # Behind the line that opens a run there may be nothing but the sentence.
    sentences = [line for line in said.err.splitlines() if not line.startswith("tiny_")]
    assert len(sentences) == 1, said.err
    assert sentences[0].startswith("headwater: ")
    return sentences[0]


@pytest.fixture
def tiny(digits: Path, tmp_path: Path) -> Path:
    """A recipe file for the digits, in a folder of its own."""
    return write_recipe(tmp_path / "tiny.yaml", "mae", digits / "train")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("objective.mask_ration=0.5", "objective.mask_ratio"),
        ("optimizr.lr=1", "did you mean optimizer?"),
        ("train.batch_size", "no override"),
        ("train.batch_size=huge", "train.batch_size"),
        ("train.batch_size=30", "train.microbatch"),
        ("data.train=null", "names no data; add data.train="),
        ("data.train=nowhere", "nowhere does not exist"),
        ("train.precision=fp16", "needs a GPU"),
        ("watch.trackers=[nonsense]", "nonsense"),
        ("encoder.model=vit_tiny_patch61_224", "vit_tiny_patch16_224"),
        ("encoder.model_args.num_heads=5", "refuses"),
    ],
)
def test_a_bad_setting_starts_nothing(setting: str, words: str, tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    if setting == "train.precision=fp16" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = ["pretrain", tiny, "train.microbatch=8", setting, "--output", tmp_path / "run"]
    assert words in refused(command, capsys)
    assert not (tmp_path / "run").exists()


def test_an_unknown_recipe_is_named(tmp_path: Path, capsys: Capture) -> None:
    assert "mae_cifar10" in refused(["pretrain", "mae_cifar", "--output", tmp_path / "run"], capsys)


def test_data_of_the_other_kind_is_refused(
    tiny: Path, digits: Path, sentences: Path, tmp_path: Path, capsys: Capture
) -> None:
    text = write_recipe(tmp_path / "text.yaml", "next_token", digits / "train")
    assert "holds images, where text should be" in refused(["pretrain", text], capsys)
    assert "holds text, where images should be" in refused(["pretrain", tiny, f"data.train={sentences}"], capsys)


def missing(shard: Path) -> None:
    shard.unlink()


def longer(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes() + bytes(512))


def flipped(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    for place in range(512, len(content), 1024):
        content[place + 20] ^= 1
    shard.write_bytes(bytes(content))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", [missing, longer, flipped])
def test_a_shard_that_changed_is_named(
    change: Callable[[Path], None], workers: int, tiny: Path, digits: Path, tmp_path: Path, capsys: Capture
) -> None:
    shutil.copytree(digits / "train", tmp_path / "shards")
    shard = sorted((tmp_path / "shards").glob("*.tar"))[0]
    change(shard)
    settings = [f"data.train={tmp_path / 'shards'}", f"data.workers={workers}", "train.steps=100"]
    sentence = refused(["pretrain", tiny, *settings, "--output", tmp_path / "run"], capsys)
    assert str(shard) in sentence
    if (tmp_path / "run").exists():
        assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
        assert not (tmp_path / "run" / "export").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(tiny: Path, digits: Path, tmp_path: Path, capsys: Capture) -> None:
    start: list[str | Path] = ["pretrain", tiny, "--output", tmp_path / "run"]
    sentence = refused([*start, "--resume", tmp_path / "nowhere"], capsys)
    assert "nowhere cannot be used" in sentence
    assert main([str(word) for word in start]) == 0
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    assert "optimizer.lr: 0.002 -> 0.5" in refused([*start, "optimizer.lr=0.5"], capsys)
    assert "other data" in refused([*start, f"data.train={digits / 'test'}"], capsys)
    assert "already holds checkpoints" in refused([*start, "--resume", "never"], capsys)
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before
    for manifest in (tmp_path / "run" / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    capsys.readouterr()
    assert main([str(word) for word in start]) == 2
    assert "no checkpoint in" in capsys.readouterr().err


def test_a_folder_that_cannot_be_a_run_is_named(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(["pretrain", tiny, "--output", tmp_path / "file"], capsys)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["finetune", "{tmp}/nowhere", "{digits}/train"], "nowhere' is not a folder"),
        (["finetune", "{tmp}", "{digits}/train"], "config.json"),
        (["export", "{tmp}", "{tmp}/out"], "is no run folder"),
        (["inspect", "{tmp}/nowhere"], "nowhere"),
        (["evaluate", "{tmp}/nowhere", "{digits}/test"], "nowhere"),
        (["predict", "{tmp}/nowhere", "{digits}"], "nowhere"),
        (["shard", "images", "{tmp}/nowhere", "{tmp}/out"], "nowhere is not a folder"),
        (["shard", "text", "{tmp}/nowhere", "{tmp}/out"], "nowhere"),
        (["pretrain", "{tmp}/tiny.yaml", "--processes", "0"], "at least one process"),
    ],
)
def test_what_is_not_there_is_named(
    words: list[str], part: str, tiny: Path, digits: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert part in refused([word.format(tmp=tmp_path, digits=digits) for word in words], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.yaml"]


def test_sharding_counts_what_it_cannot_read(tmp_path: Path, capsys: Capture) -> None:
    source = tmp_path / "pictures"
    for label in ("cat", "dog"):
        (source / label).mkdir(parents=True)
        for number in range(3):
            (source / label / f"{number}.png").write_bytes(picture(number))
    (source / "cat" / "broken.png").write_bytes(picture(9)[:60])
    (source / "dog" / "text.jpg").write_text("no picture")
    assert main(["shard", "images", str(source), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "6 pictures of 2 classes" in said
    assert "left out 2 unreadable" in said
    assert "cat/broken.png" in said
    assert "dog/text.jpg" in said


def test_sharding_what_cannot_be_sharded(tmp_path: Path, capsys: Capture) -> None:
    source, out = tmp_path / "pictures", tmp_path / "out"
    source.mkdir()
    assert "holds no pictures" in refused(["shard", "images", source, out], capsys)
    (source / "a.png").write_bytes(picture(0))
    table = tmp_path / "labels.csv"
    table.write_text("file,label\nb.png,cat\n")
    assert "'b.png' is no file" in refused(["shard", "images", source, out, "--labels", table], capsys)
    (source / "a.png").write_text("broken")
    assert "no usable sample" in refused(["shard", "images", source, out], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.csv", "pictures"]


def test_two_processes_end_with_one_sentence(tiny: Path, tmp_path: Path) -> None:
    words = ["pretrain", tiny, "--processes", "2", "train.batch_size=17", "--output", tmp_path / "run"]
    done = run("-m", "launch.cli", *words, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("headwater: a global batch of 17 cannot be split evenly over 2 processes")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_of_two_processes_meets_ends_both(rank: int, tiny: Path, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits / "train", tmp_path / "shards")
    loader = Loader(ShardedDataset(tmp_path / "shards"), 16, rank=rank, world_size=2, canvas=8, start=16 * 4)
    dataset, identity = ShardedDataset(tmp_path / "shards"), int(next(iter(loader)).ids[3])
    payload, key = dataset.image(identity)[0], dataset.key(identity)
    for shard in (tmp_path / "shards").glob("*.tar"):
        content = shard.read_bytes()
        shard.write_bytes(content.replace(payload, payload[:-1] + b"!"))
    words = ["pretrain", tiny, "--processes", "2", f"data.train={tmp_path / 'shards'}", "--output", tmp_path / "run"]
    done = run("-m", "launch.cli", *words, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"sample {key!r} does not match" in done.stderr


class Poisoned(nn.Module):
    """Makes the loss, or the gradient alone, something that is not finite."""

    def __init__(self, model: nn.Module, how: str) -> None:
        super().__init__()
        self.model, self.how = model, how

    def forward(self, batch: Any, progress: float) -> Output:
        output: Output = self.model(batch, progress)
        loss = output.loss_sum
        # The square root's slope at zero is infinite.
        loss = loss * torch.nan if self.how == "loss" else loss + (loss - loss.detach()).abs().sqrt()
        return Output(loss, output.target_count, output.metrics)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(how: str, digits: Path, tmp_path: Path) -> None:
    setup = prepare(recipe("mae", digits / "train", {"train.ema": 0.5}), tmp_path)
    state, batches = setup.state, iter(setup.loader)

    def everything() -> dict[str, Tensor]:
        tensors = state.snapshot(setup.recipe, "").tensors
        return {f"{kind}/{name}": t.clone() for kind, part in tensors.items() for name, t in part.items()}

    take_step(setup, batches)
    before, model = everything(), setup.model
    setup.model = Poisoned(model, how)
    for count in (1, 2):
        assert not take_step(setup, batches).finite
        assert (state.skipped, state.step, state.position) == (count, 1 + count, 16 * (1 + count))
    after = everything()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    setup.model = model
    assert take_step(setup, batches).finite
    assert state.skipped == 0
    assert not torch.equal(everything()["ema/blocks.0.mlp.fc1.weight"], before["ema/blocks.0.mlp.fc1.weight"])


def test_too_many_of_them_end_the_run(
    tiny: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop.take_step

    def poisoned(setup: Any, batches: Iterator[Any]) -> Any:
        if not isinstance(setup.model, Poisoned):
            setup.model = Poisoned(setup.model, "loss")
        return step(setup, batches)

    monkeypatch.setattr(loop, "take_step", poisoned)
    assert main(["pretrain", str(tiny), "train.skips=3", "--output", str(tmp_path / "run")]) == 1
    assert "4 steps in a row" in capsys.readouterr().err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 4)
