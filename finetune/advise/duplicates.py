"""A test set of distinct items, none of which is among the training samples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from data.batch import ImageBatch, TextBatch
from data.errors import UserError
from finetune.samples import Ints, Samples
from finetune.tasks import Task


@dataclass(frozen=True)
class Separation:
    """Which samples stay, and what was left out."""

    train: Ints
    """Positions of the training samples that are not in the test set, ascending."""
    test: Ints
    """Positions of the distinct test samples, ascending."""
    removed_from_train: int
    removed_from_test: int

    def apply(self, task: Task) -> Task:
        """The task with these samples."""
        return replace(task, train=task.train.select(self.train), test=task.test.select(self.test))


def separate(task: Task) -> Separation:
    """Leave out of the training samples whatever the test set holds too, and repetitions out of the test set.

    Samples are equal when an encoder sees the same: decoded pixels (not file bytes), or token ids up to the
    context. Labels are not compared.

    Raises:
        UserError: a class has no training sample left.
    """
    judged, known = digests(task.test), digests(task.train)
    seen: set[bytes] = set()
    first = np.array([not (digest in seen or seen.add(digest)) for digest in judged])  # type: ignore[func-returns-value]
    outside = np.array([digest not in seen for digest in known])
    left = np.unique(task.train.labels[outside])
    for number in range(len(task.classes)):
        if number not in left:
            raise UserError(
                f"every training sample of class {task.classes[number]!r} is in the test set too; "
                "add training samples or take them out of the test set"
            )
    return Separation(np.flatnonzero(outside), np.flatnonzero(first), int((~outside).sum()), int((~first).sum()))


def digests(samples: Samples) -> list[bytes]:
    """A hash of the content of each sample, in order."""
    found = [b""] * len(samples)
    for positions, batch in samples.batches(256):
        for position, payload in zip(positions, _contents(batch), strict=True):
            found[position] = hashlib.blake2b(payload, digest_size=16).digest()
    return found


def _contents(batch: ImageBatch | TextBatch) -> list[bytes]:
    if isinstance(batch, TextBatch):
        return [row[real].numpy().tobytes() for row, real in zip(batch.tokens, batch.documents == 0, strict=True)]
    sizes = batch.sizes.tolist()
    shapes = (f"{height}x{width}:".encode() for height, width in sizes)
    pixels = (image[:, :h, :w].contiguous().numpy() for image, (h, w) in zip(batch.images, sizes, strict=True))
    return [shape + picture.tobytes() for shape, picture in zip(shapes, pixels, strict=True)]
