"""A classification task: labelled training and test samples over one list of classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.dataset import ShardedDataset
from data.errors import UserError
from data.keyed import hash64
from finetune.controls import RawPixels
from finetune.encoder import Encoder
from finetune.image_encoder import ImageEncoder
from finetune.labelled_text import LabelledText, read_labelled_text
from finetune.samples import MEMORY_GIB, ImageSamples, Ints, Samples, TextSamples
from finetune.splits import held_out
from finetune.targets import Classification, Target
from finetune.text_encoder import DocumentEncoder

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


def load_task(train: str | Path, test: str | Path | None, encoder: Encoder) -> Task:
    """Open labelled data as `encoder` needs it.

    Pictures come from sharded datasets, text from TSV, CSV, JSONL or class folders. Classes are the
    training data's; test labels are matched to them by name. Without `test`, 20 % of each training
    class is held out by the hash of the sample's key (or text).

    Raises:
        UserError: no labels, a class without training samples, a test label that training lacks, data of
            another kind than the encoder's.
    """
    read = _read_images if encoder.kind == "images" else _read_text
    everything, classes, fingerprint, hashes = read(train, encoder, None)
    _require_all_classes(everything.labels, classes, train)
    if test is not None:
        judged, _, test_fingerprint, _ = read(test, encoder, classes)
        prints = {"train": fingerprint, "test": test_fingerprint}
        return Task(everything, judged, classes, prints, held_out=False)
    out = held_out(everything.labels, TEST_SHARE, hashes)
    if not out.any():
        raise UserError(f"{train} has one sample a class, too few to hold out a test set; give one with --test")
    inside, outside = everything.select(np.flatnonzero(~out)), everything.select(np.flatnonzero(out))
    return Task(inside, outside, classes, {"train": fingerprint, "test": fingerprint}, held_out=True)


def load_test(test: str | Path, encoder: Encoder, classes: list[str]) -> tuple[Samples, str]:
    """Labelled samples over given classes, and the data's fingerprint; raises as `load_task` does."""
    samples, _, fingerprint, _ = (_read_images if encoder.kind == "images" else _read_text)(test, encoder, classes)
    return samples, fingerprint


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


_Read = tuple[Samples, list[str], str, np.ndarray]


def _read_images(source: str | Path, encoder: Encoder, known: list[str] | None) -> _Read:
    assert isinstance(encoder, ImageEncoder | RawPixels)
    path = Path(source)
    if path.suffix in (".tsv", ".csv", ".jsonl"):
        raise UserError(
            f"the encoder is for images, but {path} holds text; shard pictures with `headwater shard images`"
        )
    dataset = ShardedDataset(source, context=1)
    if dataset.kind != "images":
        raise UserError(f"the encoder is for images, but {source} holds {dataset.kind}")
    ids, labels = dataset.all_ids(), dataset.labels()
    labelled = labels >= 0
    if not labelled.any():
        raise UserError(f"{source} has no labels; shard with class folders or --labels CSV")
    ids, labels = ids[labelled], labels[labelled]
    names = dataset.classes or [str(number) for number in range(int(labels.max()) + 1)]
    labels = _match(labels, names, known, source)
    hashes = _hashes([dataset.key(int(i)) for i in ids]) if known is None else np.empty(0)
    return (
        ImageSamples(dataset, ids, labels, encoder.canvas, Classification(known or names)),
        known or names,
        dataset.fingerprint,
        hashes,
    )


def _read_text(source: str | Path, encoder: Encoder, known: list[str] | None) -> _Read:
    assert isinstance(encoder, DocumentEncoder)
    if (Path(source) / "dataset.json").is_file():
        raise UserError(f"{source} holds shards, which carry no labels for text; give texts and labels as a TSV file")
    read: LabelledText = read_labelled_text(source)
    names = read.classes()
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers[label] for label in read.labels], dtype=np.int64)
    labels = _match(labels, names, known, source)
    samples = TextSamples(encoder.tokenize(read.texts), labels, encoder, Classification(known or names))
    return samples, known or names, read.fingerprint, _hashes(read.texts)


def _match(labels: Ints, names: list[str], known: list[str] | None, source: str | Path) -> Ints:
    """Labels over `names` as labels over the `known` classes, by name."""
    if known is None or names == known:
        return labels
    places = np.array([known.index(name) if name in known else -1 for name in names], dtype=np.int64)
    matched = places[labels]
    if (matched < 0).any():
        unseen = sorted({names[label] for label in labels[matched < 0]})
        raise UserError(
            f"{source} has {_list(unseen)}, which the training data lacks (its classes: {_list(known)}); "
            "add training samples or remove these test samples"
        )
    return matched


def _require_all_classes(labels: Ints, classes: list[str], source: str | Path) -> None:
    if len(classes) < 2:
        raise UserError(f"{source} has the one class {classes[0]!r}; a classification task needs two or more")
    empty = [classes[i] for i in np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)]
    if empty:
        raise UserError(f"{source} names {_list(empty)} but has no sample of it; add samples or remove the class")


def _list(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return f"{'class' if len(names) == 1 else 'classes'} {shown}" + (f" and {len(names) - 5} more" * (len(names) > 5))


def _hashes(names: list[str]) -> np.ndarray:
    """uint64 (n,): equal names get equal hashes, in every process and version."""
    digests = b"".join(hashlib.blake2b(n.encode("utf-8", "surrogateescape"), digest_size=8).digest() for n in names)
    return hash64(0x7E57, np.frombuffer(digests, dtype="<i8"))
