"""Fixtures that several tests share: tiny datasets, made once a session."""

from __future__ import annotations

import io
import os
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pretrain_kit import digits, fresh_accelerate, sentences  # noqa: F401 - fixtures

from data.shards import DatasetWriter

REPOSITORY = Path(__file__).resolve().parent.parent
DATASETS = REPOSITORY.parent / "shared" / "datasets"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What a test does with signals ends with it."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def picture(number: int, height: int = 8, width: int = 8, format: str = "PNG") -> bytes:
    """An encoded picture of noise that no other number has."""
    noise = np.random.Generator(np.random.Philox(number)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, format)
    return buffer.getvalue()


def write_pictures(out: Path, count: int, samples_per_shard: int, classes: int = 3) -> Path:
    """A dataset of noise pictures: sample `n` is `picture(n)` under the key `c/n` with the label n % classes."""
    with DatasetWriter(out, "images", samples_per_shard) as writer:
        writer.extra = {"classes": [f"class {number}" for number in range(classes)]}
        for number in range(count):
            height, width = 5 + number % 4, 5 + number % 3
            writer.add(f"c/{number:05d}", {"png": picture(number, height, width)}, number % classes)
    return out


@pytest.fixture(scope="session")
def picture_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 pictures in shards of 7 (the last holds one)."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "shards", 50, 7)


@pytest.fixture(scope="session")
def cifar_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 CIFAR-10 training pictures of each class as a folder tree; skips where the archive is missing."""
    archive = DATASETS / "cifar10.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive.name} is not beside the repository (../shared/datasets)")
    root = tmp_path_factory.mktemp("cifar")
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            parts = member.name.split("/")
            if parts[0] != "train":
                break
            if member.isfile() and parts[-1] < "0030":
                tar.extract(member, root, filter="data")
    return root / "train"
