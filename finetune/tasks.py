"""A task: training and test samples with what is to be said about them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import UserError
from data.keyed import hash64
from finetune.encoder import Encoder
from finetune.reading import Read, read
from finetune.samples import MEMORY_GIB, ImageSamples, Samples
from finetune.splits import held_out
from finetune.targets import Target, TaskName
from finetune.targets_class import Classification

TEST_SHARE = 0.2
"""Share of the labelled samples that is held out where no test set is given."""
Report = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What `finetune` learns from and is judged on."""

    train: Samples
    test: Samples
    classes: list[str]
    fingerprints: dict[str, str]
    """Of the `train` and the `test` data."""
    held_out: bool
    """Whether the test samples are a share of the training data."""

    @property
    def target(self) -> Target:
        """What the task asks about a sample."""
        return self.train.target


def load_task(train: str | Path, test: str | Path | None, encoder: Encoder, task: TaskName = "classification") -> Task:
    """Open labelled data as `encoder` needs it.

    What data may be is said in `finetune.reading`. Classes are the training data's; test labels are matched
    to them by name. Without `test`, 20 % of each training class (of all samples, where the task is no
    classification) are held out by the hash of the sample's key, path or text.

    Raises:
        UserError: no labels, a class without training samples, a test label that training lacks, data of
            another kind than the encoder's or the task's.
    """
    found = read(train, encoder, task, None)
    everything, target = found.samples, found.samples.target
    if test is not None:
        judged = read(test, encoder, task, target)
        prints = {"train": found.fingerprint, "test": judged.fingerprint}
        return Task(everything, judged.samples, target.classes, prints, held_out=False)
    out = _out(found)
    if not out.any():
        raise UserError(f"{train} has one sample a class, too few to hold out a test set; give one with --test")
    inside, outside = everything.select(np.flatnonzero(~out)), everything.select(np.flatnonzero(out))
    prints = {"train": found.fingerprint, "test": found.fingerprint}
    return Task(inside, outside, target.classes, prints, held_out=True)


def load_test(test: str | Path, encoder: Encoder, known: list[str] | Target) -> tuple[Samples, str]:
    """Labelled samples over given classes (or a target's), and the data's fingerprint; raises as `load_task` does."""
    target = known if isinstance(known, Target) else Classification(known)
    found = read(test, encoder, target.name, target)
    return found.samples, found.fingerprint


def load_held_out(train: str | Path, encoder: Encoder, target: Target) -> Samples:
    """The share of labelled samples that `load_task` holds out where it is given no test set, over the target's
    classes; raises as `load_task` does."""
    found = read(train, encoder, target.name, target)
    return found.samples.select(np.flatnonzero(_out(found)))


def settle(samples: Samples, report: Report) -> None:
    """Decode pictures into memory for repeated use, or say why not."""
    if not isinstance(samples, ImageSamples) or samples.in_memory:
        return
    if samples.gibibytes <= MEMORY_GIB:
        samples.decode()
    else:
        report(
            f"{len(samples):,} decoded pictures would take {samples.gibibytes:.1f} GiB of memory; "
            "they are read from the shards at each use"
        )


def _out(found: Read) -> np.ndarray:
    """bool (n,): which samples are held out."""
    return held_out(found.samples.labels, TEST_SHARE, _hashes(found.names))


def _hashes(names: list[str]) -> np.ndarray:
    """uint64 (n,): equal names get equal hashes, in every process and version."""
    digests = b"".join(hashlib.blake2b(n.encode("utf-8", "surrogateescape"), digest_size=8).digest() for n in names)
    return hash64(0x7E57, np.frombuffer(digests, dtype="<i8"))
