"""The benchmark of fine-tuning compares like with like: same pictures, same tokens, same features, same parameters."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pretrain_kit import REPOSITORY
from test_finetune_kit import sentences, write_text_encoder, write_tsv
from torch import nn

from data.image_shards import shard_images
from data.tokenizer import load, tokenizer_files

sys.path.insert(0, str(REPOSITORY / "tests" / "bench"))
import finetune_speed
import finetune_speed_pictures as pictures
import finetune_speed_text as text


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line: shards, the same pictures in folders, a text export, labelled texts."""
    root, draw = tmp_path_factory.mktemp("speed"), np.random.Generator(np.random.Philox(5))
    for name in ("dark", "light"):
        (root / "folders" / name).mkdir(parents=True)
        for number in range(40):
            pixels = draw.integers(0, 128, (32, 32, 3)) + 100 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(root / "folders" / name / f"{number:02d}.png")
    shard_images(root / "folders", root / "shards")
    export = write_text_encoder(root / "export", causal=False)
    for name, content in tokenizer_files(load(export), context=32, causal=False).items():
        (export / name).write_bytes(content)
    table = write_tsv(root / "texts.tsv", *sentences(60, 1))
    return [str(path) for path in (root / "shards", root / "folders", export, table)]


def _sides(words: list[str], name: str, folder: Path) -> tuple[finetune_speed.Contest, ...]:
    arguments = finetune_speed.arguments_from([*words, "--small"])
    made = pictures.picture_contests if name == "pictures" else text.text_contests
    return tuple(made(arguments, folder))


@pytest.mark.parametrize("name", ["pictures", "text"])
def test_both_sides_extract_the_same_features_and_train_as_many_parameters(
    words: list[str], name: str, tmp_path: Path
) -> None:
    *features, full = _sides(words, name, tmp_path)
    for contest in features:
        ours, theirs = (side(contest.amount) for side in contest.sides)
        assert isinstance(ours, torch.Tensor)
        assert isinstance(theirs, torch.Tensor)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert ours.std(dim=0).mean() > 1e-3  # samples differ, so their order counts
    models = [side(1) for side in full.sides]
    counts = [sum(p.numel() for p in model.parameters()) for model in models if isinstance(model, nn.Module)]
    assert len(counts) == 2
    assert counts[0] == counts[1]


def test_pictures_are_spread_over_the_classes(words: list[str], tmp_path: Path) -> None:
    arguments = finetune_speed.arguments_from([*words, "--small"])
    ours = pictures.Ours(arguments.shards, pictures.write_encoder(tmp_path / "encoder"), 20, 8)
    assert min(np.bincount(ours.samples.labels, minlength=2)) >= 4
    with pytest.raises(SystemExit, match="lacks 1 pictures"):
        pictures.Timm(arguments.folders, [*ours.names, "dark/nowhere"], tmp_path / "encoder", 8)


def test_a_further_step_leaves_out_what_happens_once() -> None:
    contest = finetune_speed.Contest("a", "b", (lambda n: None, lambda n: None), amount=10, batch=4)
    contest.times = [[(3.0, 3.0), (4.0, 4.0)], [(1.0, 1.0), (3.0, 5.0)]]
    further, whole = contest.lines()
    assert re.search(r" 40 headwater +20 b +x 2.00 \(CPU x 4.00\)", further)
    assert re.search(r" 20 headwater +27 b +x 0.75 \(CPU x 1.25\)", whole)


def test_the_script_prints_a_ratio_for_every_contest(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    finetune_speed.main([*words, "--small", "--threads", str(threads)])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.search(r"headwater .* x \d+\.\d\d \(CPU x \d+\.\d\d\)", line)]) == 7
