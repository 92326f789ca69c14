"""Laws of parallel preparation: any number of workers, parts and kills makes the same dataset, byte for byte."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data.image_shards
from data.dataset import ShardedDataset
from data.errors import UserError
from data.image_shards import Choices, shard_images
from data.inspect import inspect
from data.parts import Part, merge, parse_part
from data.reencode import Remaking
from data.text import shard_text
from data.text_parts import shard_text_part
from launch.cli import main

FIVES = Choices(samples_per_shard=5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """43 pictures of three classes, two broken files among them, some with captions."""
    root = tmp_path_factory.mktemp("source")
    for number in range(43):
        path = root / "abc"[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"broken" if number in (7, 30) else picture(number))
        if number % 4 == 0:
            path.with_suffix(".txt").write_text(f"picture {number}")
    return root


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset as one process without workers writes it."""
    out = tmp_path_factory.mktemp("straight") / "out"
    shard_images(source, out, FIVES, progress=False)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


def same(one: Path, other: Path) -> None:
    assert contents(one) == contents(other)
    assert ShardedDataset(one).fingerprint == ShardedDataset(other).fingerprint


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_change_nothing(source: Path, straight: Path, tmp_path: Path, workers: int) -> None:
    summary = shard_images(source, tmp_path / "out", FIVES, workers=workers, progress=False)
    same(tmp_path / "out", straight)
    assert summary["samples"] == 41
    assert sorted(name for name, _ in summary["unreadable"]) == ["a/30.png", "b/07.png"]
    assert (tmp_path / "out" / "dataset.json").read_bytes() == (straight / "dataset.json").read_bytes()


@given(st.integers(1, 12), st.randoms(use_true_random=False))
@settings(max_examples=8, deadline=None)
def test_parts_in_any_order_make_the_same_dataset(
    source: Path, straight: Path, tmp_path_factory: pytest.TempPathFactory, count: int, draw: Any
) -> None:
    out = tmp_path_factory.mktemp("parts") / "out"
    numbers = list(range(count))
    draw.shuffle(numbers)
    for number in numbers:
        with pytest.raises(UserError, match=r"is not whole: parts|holds no parts"):
            merge(out)
        assert not (out / "dataset.json").exists()
        shard_images(source, out, FIVES, part=Part(number, count), progress=False)
    summary = merge(out)
    assert summary == {"samples": 41, "shards": 9, "parts": count, "unreadable": 2}
    same(out, straight)
    assert inspect(out)["problems"] == []
    assert merge(out)["parts"] == 0  # joined already
    again = shard_images(source, out, FIVES, part=Part(0, count), progress=False)
    assert again["already"]
    same(out, straight)


def test_a_finished_part_does_nothing_and_a_killed_one_goes_on(
    source: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, part, write = tmp_path / "out", Part(0, 2), data.image_shards.write_shard
    written: list[str] = []

    def third_fails(job: Any) -> Any:
        if len(written) == 2:
            job.tar.with_name(f".{job.tar.name}.1.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(job.tar.name)
        return write(job)

    monkeypatch.setattr(data.image_shards, "write_shard", third_fails)
    with pytest.raises(KeyboardInterrupt):
        shard_images(source, out, FIVES, part=part, progress=False)
    first = list(written)
    monkeypatch.setattr(data.image_shards, "write_shard", lambda job: (written.append(job.tar.name), write(job))[1])
    os.truncate(out / first[1], 100)  # and one that was recorded as whole is not
    shard_images(source, out, FIVES, part=part, progress=False)
    assert written == [*first, first[1], "shard-000004.tar", "shard-000006.tar", "shard-000008.tar"]
    assert not list(out.glob(".*.partial"))
    count = len(written)
    assert shard_images(source, out, FIVES, part=part, progress=False)["already"]
    assert len(written) == count
    shard_images(source, out, FIVES, part=Part(1, 2), progress=False)
    merge(out)
    same(out, straight)


def write_part(source: Path, out: Path) -> None:
    shard_images(source, out, Choices(samples_per_shard=1), workers=2, part=Part(0, 1), progress=False)


def test_sigkill_at_any_time_and_again(source: Path, tmp_path: Path) -> None:
    """A job array's part killed again and again, workers and all, ends with the dataset of a straight run."""
    out, context = tmp_path / "out", multiprocessing.get_context("fork")
    for delay in (0.02, 0.05, 0.1, 0.2):
        process = context.Process(target=write_part, args=(source, out))
        process.start()
        time.sleep(delay)
        process.kill()
        process.join()
    write_part(source, out)
    merge(out)
    shard_images(source, tmp_path / "straight", Choices(samples_per_shard=1), progress=False)
    same(out, tmp_path / "straight")


def test_parts_that_do_not_fit_together_are_refused(source: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard_images(source, out, FIVES, part=Part(0, 2), progress=False)
    for choices, part in ((Choices(samples_per_shard=6), Part(1, 2)), (FIVES, Part(1, 3))):
        with pytest.raises(UserError, match="is being written in 2 parts from other files or with other settings"):
            shard_images(source, out, choices, part=part, progress=False)
    with pytest.raises(UserError, match="already exists and is not written in parts"):
        shard_images(source, straight, FIVES, part=Part(0, 2), progress=False)
    with pytest.raises(UserError, match="already exists"):
        shard_images(source, out, FIVES, progress=False)
    with pytest.raises(UserError, match="do not go together"):
        shard_images(source, out, FIVES, part=Part(1, 2), overwrite=True, progress=False)
    with pytest.raises(UserError, match=r"parts 1/2 are not done"):
        merge(out)
    with pytest.raises(UserError, match="holds no parts"):
        merge(tmp_path)
    for text in ("2/2", "1", "a/b", "-1/2", "1/0"):
        with pytest.raises(UserError, match="parts count from 0"):
            parse_part(text)


def test_pictures_are_shrunk_and_encoded_as_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "source"
    root.mkdir()
    turned = Image.new("RGB", (100, 60), (200, 30, 30))
    exif = turned.getexif()
    exif[0x0112] = 6  # upright it is 60 wide and 100 high
    turned.save(root / "turned.jpg", exif=exif)
    Image.new("RGBA", (90, 45), (0, 0, 255, 128)).save(root / "wide.png")
    Image.new("L", (20, 30), 77).save(root / "small.png")
    Image.new("CMYK", (300, 200), (0, 255, 255, 0)).save(root / "print.jpg")
    Image.new("RGB", (64, 64), (1, 2, 3)).save(root / "modern.webp")
    (root / "broken.jpg").write_bytes(b"?")
    assert main(["shard", "images", str(root), str(tmp_path / "out"), "--resize", "30", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "4 encoded anew (shorter side at most 30, JPEG quality 90)" in said
    dataset = ShardedDataset(tmp_path / "out")
    assert dataset.manifest["remade"] == {"shorter_side": 30, "jpeg_quality": 90, "all": False}
    images = {dataset.key(n): Image.open(io.BytesIO(dataset.image(n)[0])) for n in range(len(dataset))}
    sizes = {key: image.size for key, image in images.items()}
    assert sizes == {"turned": (30, 50), "wide": (60, 30), "small": (20, 30), "print": (45, 30), "modern": (30, 30)}
    assert {key: image.format for key, image in images.items()} == {
        key: "PNG" if key == "small" else "JPEG" for key in sizes
    }
    red = images["turned"].convert("RGB").getpixel((15, 25))
    assert max(abs(a - b) for a, b in zip(red, (200, 30, 30), strict=True)) < 12  # type: ignore[arg-type]
    shard_images(root, tmp_path / "all", Choices(remaking=Remaking(quality=50)), progress=False)
    everything = ShardedDataset(tmp_path / "all")
    assert all(Image.open(io.BytesIO(everything.image(n)[0])).format == "JPEG" for n in range(5))
    assert everything.fingerprint != dataset.fingerprint
    for arguments, message in ((Remaking, "give at least 1"), (lambda _: Remaking(quality=96), "give 1 to 95")):
        with pytest.raises(UserError, match=message):
            arguments(0)


def test_duplicates_are_stored_once_and_disputes_counted(source: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(source, tmp_path / "source"))
    (root / "b").mkdir(exist_ok=True)
    shutil.copy(root / "a" / "00.png", root / "a" / "99.png")
    shutil.copy(root / "a" / "00.png", root / "b" / "zz.jpg")  # another name, another label
    choices = Choices(samples_per_shard=5, dedup=True)
    summary = shard_images(root, tmp_path / "out", choices, progress=False)
    assert (summary["samples"], summary["duplicates"], summary["disputed"]) == (
        41,
        3,
        2,
    )  # the broken files are alike too
    dataset = ShardedDataset(tmp_path / "out")
    payloads = [dataset.image(n) for n in range(len(dataset))]
    assert len({payload for payload, _ in payloads}) == len(payloads)
    assert dict(payloads)[picture(0)] == 0  # the first in the order of paths stays
    for number in range(2):
        shard_images(root, tmp_path / "parts", choices, part=Part(number, 2), progress=False)
    merge(tmp_path / "parts")
    same(tmp_path / "parts", tmp_path / "out")


def test_files_beside_pictures_are_stored_with_them(source: Path, tmp_path: Path) -> None:
    shard_images(source, tmp_path / "out", Choices(beside=("txt", "json")), workers=1, progress=False)
    dataset = ShardedDataset(tmp_path / "out")
    found = {dataset.key(n): dataset.sample(n) for n in range(len(dataset))}
    assert found["a/12"] == {"png": picture(12), "txt": b"picture 12"}
    assert found["b/13"] == {"png": picture(13)}
    assert dataset.image(0)[0] == dataset.sample(0)["png"]
    for name in ("png", "../x", "cls", "a.b"):
        with pytest.raises(UserError, match="cannot be stored beside"):
            shard_images(source, tmp_path / "no", Choices(beside=(name,)), progress=False)


def test_the_command_line_writes_parts_and_joins_them(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    words = ["shard", "images", str(source), out, "--shard-size", "10", "--workers", "1", "--part"]
    assert main([*words, "0/2"]) == 0
    assert f"headwater shard merge {out}" in capsys.readouterr().out
    assert main(["shard", "merge", out]) == 2
    assert main([*words, "1/2"]) == main([*words, "1/2"]) == 0
    assert "part 1/2 of" in capsys.readouterr().out
    assert main(["shard", "merge", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 41
    assert main(["shard", "merge", out]) == 0
    assert "is joined already" in capsys.readouterr().out
    assert main([*words, "2/2"]) == 2


def test_text_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every document once; which shard it is in depends on the number of parts."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(7):
        (texts / f"{number}.txt").write_text("\n".join(f"{number} and {n} are numbers" for n in range(60)))
    settings = {"document": "line", "validation": 0.1, "progress": False}
    whole = shard_text([texts], tmp_path / "whole", vocab_size=300, **settings)  # type: ignore[arg-type]
    out, tokenizer = tmp_path / "out", tmp_path / "whole"
    with pytest.raises(UserError, match="all parts must use one tokenizer"):
        shard_text_part([texts], out, Part(0, 3), tokenizer=None)
    for number in (2, 0, 1):
        shard_text_part([texts], out, Part(number, 3), tokenizer=tokenizer, **settings)
    assert shard_text_part([texts], out, Part(1, 3), tokenizer=tokenizer, **settings) == {"already": True}
    summary = merge(out)
    joined = ShardedDataset(out, context=8)
    held = ShardedDataset(out / "validation", context=8)
    assert summary["documents"] + held.manifest["documents"] == whole["documents"] + whole["validation"]["documents"]
    assert joined.manifest["tokens"] == sum(shard["tokens"] for shard in joined.manifest["shards"])
    assert inspect(out)["problems"] == inspect(out / "validation")["problems"] == []
    assert (out / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    assert not (out / ".parts").exists()
    words = ["shard", "text", str(texts), str(tmp_path / "cli"), "--tokenizer", str(tokenizer), "--part"]
    assert main([*words, "0/1"]) == main(["shard", "merge", str(tmp_path / "cli")]) == 0
    assert "part 0/1" in capsys.readouterr().out
