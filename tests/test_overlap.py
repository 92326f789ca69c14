"""What is chosen on must not be what is judged on: not even when it was re-encoded, corrupted or respelled."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_finetune_kit import write_encoder, write_images, write_text_encoder

from data.corruptions import corrupt
from data.errors import UserError
from finetune.encoder import load_encoder
from finetune.ensemble import ensemble
from finetune.heads import LinearHead
from finetune.members import Member
from finetune.model import TaskModel
from finetune.overlap import overlap
from finetune.samples import Samples
from finetune.tasks import load_test

NAMES = ["a", "b"]


def _pictures(folder: Path, seed: int, count: int = 60) -> Path:
    """Shards of soft random pictures of 32 pixels a side."""
    draw = np.random.Generator(np.random.Philox(seed))
    coarse = draw.integers(0, 256, (count, 5, 5), dtype=np.uint8)
    images = np.stack([np.asarray(Image.fromarray(each).resize((32, 32), Image.Resampling.BICUBIC)) for each in coarse])
    return write_images(folder, images, np.arange(count) % 2, NAMES)


def _member(folder: Path) -> Member:
    encoder = load_encoder(write_encoder(folder))
    return Member("model", TaskModel(encoder, LinearHead(encoder.features, 2, seed=0), NAMES))


def test_corrupted_copies_are_found_and_others_are_not(tmp_path: Path) -> None:
    member = _member(tmp_path / "encoder")
    first, other = _pictures(tmp_path / "first", 1), _pictures(tmp_path / "other", 2)

    def samples(source: Path) -> Samples:
        return load_test(source, member.model.encoder, NAMES)[0]

    same = overlap(samples(first), samples(first))
    assert (same.equal, same.near) == (1.0, 1.0)
    apart = overlap(samples(first), samples(other))
    assert apart.equal == 0.0
    assert apart.near < 0.05
    for kind in ("noise", "jpeg", "blur", "brightness"):
        corrupt(first, tmp_path / kind, kind, 3)
        found = overlap(samples(first), samples(tmp_path / kind))
        assert found.equal < 0.05
        assert found.near > 0.9
    half = samples(tmp_path / "noise").select(np.arange(30))
    assert 0.4 < overlap(samples(first), half).near <= 0.5


def test_nothing_is_chosen_on_a_corrupted_copy_of_the_test_set(tmp_path: Path) -> None:
    member = _member(tmp_path / "encoder")
    test, other = _pictures(tmp_path / "test", 1), _pictures(tmp_path / "other", 2)
    corrupt(test, tmp_path / "noisy", "noise", 2)
    with pytest.raises(UserError, match="share 100 % of the first"):
        ensemble([member], test, validation=tmp_path / "noisy", report=lambda _: None, cpu=True)
    found = ensemble([member], test, validation=other, report=lambda _: None, cpu=True)
    assert found["members"][0]["weight"] == 1.0


def test_texts_are_compared_without_case_and_punctuation(tmp_path: Path) -> None:
    encoder = load_encoder(write_text_encoder(tmp_path / "encoder"))
    lines = {
        "first": ["a good film", "a bad film", "the fine dull film", "good and bad"],
        "again": ["A good film!", "a bad, bad film", "the fine dull film", "Good and bad."],
    }
    for name, texts in lines.items():
        rows = [f"{text}\t{number % 2}" for number, text in enumerate(texts)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    first, again = (load_test(tmp_path / f"{name}.tsv", encoder, ["0", "1"])[0] for name in lines)
    found = overlap(first, again)
    assert (found.equal, found.near) == (0.25, 0.75)
