"""Corrupted copies keep keys and labels, depend on keys alone, and get worse with severity."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import write_pictures
from PIL import Image

from data.corruptions import CORRUPTIONS, Corruption, corrupt, corrupted
from data.dataset import ShardedDataset
from data.errors import UserError


def _gradient(side: int) -> Image.Image:
    y, x = np.mgrid[0:side, 0:side] / side
    waves = np.stack([x, y, 0.5 + 0.4 * np.sin(9 * x * y)], axis=2)
    return Image.fromarray((255 * waves).astype(np.uint8))


@pytest.mark.parametrize("kind", CORRUPTIONS)
@pytest.mark.parametrize("side", [32, 96])
def test_each_severity_is_further_from_the_picture(kind: Corruption, side: int) -> None:
    image = _gradient(side)
    plain = np.asarray(image, dtype=float)
    seen = [np.asarray(corrupted(image, kind, severity, 7), dtype=float) for severity in range(1, 6)]
    distances = [np.abs(each - plain).mean() for each in seen]
    assert all(each.shape == plain.shape for each in seen)
    assert 0 < distances[0] < distances[1] < distances[2] < distances[3] < distances[4]


def test_noise_has_the_stated_deviation_and_comes_from_the_key() -> None:
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    noise = np.asarray(corrupted(grey, "noise", 3, 5), dtype=float) / 255 - 128 / 255
    assert noise.std() == pytest.approx(0.08, rel=0.05)
    assert abs(noise.mean()) < 0.005
    again, other = corrupted(grey, "noise", 3, 5), corrupted(grey, "noise", 3, 6)
    assert np.array_equal(np.asarray(again, dtype=float) / 255 - 128 / 255, noise)
    assert not np.array_equal(np.asarray(other), np.asarray(again))


def test_brightness_is_added_to_the_largest_channel() -> None:
    picture = Image.new("RGB", (4, 4), (100, 50, 0))
    bright = np.asarray(corrupted(picture, "brightness", 4, 0))[0, 0]
    assert bright.tolist() == [151, 76, 0]
    assert np.asarray(corrupted(Image.new("RGB", (4, 4)), "brightness", 4, 0))[0, 0].tolist() == [51, 51, 51]


def test_a_copy_keeps_keys_labels_and_classes(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", 23, 7)
    done = corrupt(source, tmp_path / "noisy", "noise", 5, seed=1)
    assert (done["samples"], done["unreadable"]) == (23, [])
    one, two = ShardedDataset(source), ShardedDataset(tmp_path / "noisy")
    assert one.classes == two.classes
    assert one.labels().tolist() == two.labels().tolist()
    assert [one.key(int(i)) for i in one.all_ids()] == [two.key(int(i)) for i in two.all_ids()]
    pictures = [Image.open(io.BytesIO(two.image(i)[0])) for i in (0, 20)]
    assert all(picture.format == "PNG" for picture in pictures)
    corrupt(source, tmp_path / "again", "noise", 5, seed=1)
    assert ShardedDataset(tmp_path / "again").image(20) == two.image(20)
    corrupt(source, tmp_path / "other", "noise", 5, seed=2)
    assert ShardedDataset(tmp_path / "other").image(20) != two.image(20)


def test_bad_wishes_are_refused(tmp_path: Path) -> None:
    source = write_pictures(tmp_path / "source", 3, 7)
    with pytest.raises(UserError, match="no corruption 'fog'; choose one of noise"):
        corrupt(source, tmp_path / "out", "fog", 1)
    with pytest.raises(UserError, match="severity 6"):
        corrupt(source, tmp_path / "out", "blur", 6)
    with pytest.raises(UserError, match="already exists"):
        corrupt(source, source, "blur", 1)
    assert not (tmp_path / "out").exists()
