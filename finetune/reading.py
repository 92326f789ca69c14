"""Labelled data -> samples, for each kind of task and of encoder.

pictures   classification: shards, a folder of class folders, or a table (CSV, TSV, JSONL) of paths and labels
           multi-label, regression: such a table, or shards with a `json` part (`{"labels": […]}`, `{"value": …}`)
           segmentation: folders `images` and `masks`, or shards with a mask part
text       classification: a table of texts and labels, or a folder of class folders
           multi-label, regression: such a table
           tokens: words and tags in columns, or JSONL
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.dataset import ShardedDataset
from data.errors import UserError
from finetune.controls import RawPixels
from finetune.dense_samples import MaskSamples
from finetune.encoder import Encoder
from finetune.image_encoder import ImageEncoder
from finetune.labelled_text import class_name, read_labelled_text
from finetune.masks import read_masked
from finetune.pictures import LabelledPictures, PictureSource, read_class_folders, read_picture_table
from finetune.samples import ImageSamples, Ints, Samples, TextSamples
from finetune.table import LABEL_COLUMNS, SUFFIXES, Row, column
from finetune.tagged_text import read_tagged_text, row_names, tag_samples
from finetune.targets import Target, TaskName
from finetune.targets_dense import Segmentation
from finetune.text_encoder import DocumentEncoder
from finetune.values import Encoded, Where, encode_classes, encode_label_sets, encode_quantities, sorted_names


class Read(NamedTuple):
    """Samples and what identifies them."""

    samples: Samples
    fingerprint: str
    names: list[str]
    """Of the samples: keys, paths or texts."""


def read(source: str | Path, encoder: Encoder, task: TaskName, known: Target | None) -> Read:
    """Labelled samples of `source`, over the `known` target's classes or, without one, over their own.

    Raises:
        UserError: see `load_task`.
    """
    if encoder.kind == "text":
        assert isinstance(encoder, DocumentEncoder)
        if task == "segmentation":
            raise UserError("segmentation is a task on pictures, and the encoder is for text")
        return _tagged(source, encoder, known) if task == "tokens" else _texts(source, encoder, task, known)
    assert isinstance(encoder, ImageEncoder | RawPixels)
    if task == "tokens":
        raise UserError("--task tokens tags the words of texts, and the encoder is for images")
    return _masked(source, encoder, known) if task == "segmentation" else _pictures(source, encoder, task, known)


def _texts(source: str | Path, encoder: DocumentEncoder, task: TaskName, known: Target | None) -> Read:
    if (Path(source) / "dataset.json").is_file():
        raise UserError(f"{source} holds shards, which carry no labels for text; give texts and labels as a TSV file")
    found = read_labelled_text(source, one_class=task == "classification")
    encoded = _encode(task, found.labels, lambda i: f"{found.source}, line {found.lines[i]}", known, source)
    samples = TextSamples(encoder.tokenize(found.texts), encoded.labels, encoder, encoded.target)
    samples.values = encoded.values
    return Read(samples, found.fingerprint, found.texts)


def _tagged(source: str | Path, encoder: DocumentEncoder, known: Target | None) -> Read:
    found = read_tagged_text(source)
    samples = tag_samples(found, encoder, known)
    return Read(samples, found.fingerprint, row_names(found, samples.owners))


def _pictures(source: str | Path, encoder: ImageEncoder | RawPixels, task: TaskName, known: Target | None) -> Read:
    path = Path(source).expanduser()
    if path.suffix in SUFFIXES and path.parent.is_dir():
        return _listed(read_picture_table(path), encoder, task, known, source)
    if path.is_dir() and not (path / "dataset.json").is_file() and not any(path.glob("*.tar*")):
        if task != "classification":
            raise UserError(
                f"{source} is a folder of pictures, which says nothing of {task}; "
                "give a table (.csv, .tsv, .jsonl) of their paths and labels"
            )
        found, names = read_class_folders(path)
        return _listed(found, encoder, task, known, source, names)
    return _shards(source, encoder, task, known)


def _listed(
    found: LabelledPictures,
    encoder: ImageEncoder | RawPixels,
    task: TaskName,
    known: Target | None,
    source: str | Path,
    names: list[str] | None = None,
) -> Read:
    def where(i: int) -> str:
        return f"{source}, line {found.lines[i]}"

    labels = found.labels
    if task == "classification":
        rows = zip(found.lines, found.names, labels, strict=True)
        labels = [class_name(Path(source), Row(*row)) for row in rows]
    encoded = _encode(task, labels, where, known, source, names)
    return Read(_samples(found.files, np.arange(len(labels)), encoder, encoded), found.fingerprint, found.names)


def _shards(source: str | Path, encoder: ImageEncoder | RawPixels, task: TaskName, known: Target | None) -> Read:
    dataset = ShardedDataset(source, context=1)
    if dataset.kind != "images":
        raise UserError(f"the encoder is for images, but {source} holds {dataset.kind}")
    ids, labels = dataset.all_ids(), dataset.labels()
    if task == "classification":
        ids, labels = ids[labels >= 0], labels[labels >= 0]
        if not len(ids):
            raise UserError(f"{source} has no labels; shard with class folders or --labels CSV")
        names = dataset.classes or [str(number) for number in range(int(labels.max()) + 1)]
        encoded = encode_classes(labels, names, known, source)
    else:
        raw = [_described(dataset, int(i), task) for i in ids]
        encoded = _encode(task, raw, lambda i: f"sample {dataset.key(int(ids[i]))!r} of {source}", known, source)
    keys = [dataset.key(int(i)) for i in ids]
    return Read(_samples(dataset, ids, encoder, encoded), dataset.fingerprint, keys)


def _described(dataset: ShardedDataset, identity: int, task: TaskName) -> Any:
    """What the `json` part of a sample in shards says for the task."""
    part = dataset.sample(identity).get("json")
    where = f"sample {dataset.key(identity)!r} in {dataset.shard_name(identity)}"
    try:
        fields = {} if part is None else json.loads(part)
        place = column(list(fields), LABEL_COLUMNS)
    except (ValueError, TypeError):
        raise UserError(f"{where} has a part .json that is no JSON object") from None
    if place is None:
        raise UserError(
            f"{where} has no .json part with one of the fields {', '.join(LABEL_COLUMNS)}, which {task} needs; "
            "give a table (.csv, .tsv, .jsonl) of pictures and labels"
        )
    return fields[list(fields)[place]]


def _masked(source: str | Path, encoder: ImageEncoder | RawPixels, known: Target | None) -> Read:
    assert known is None or isinstance(known, Segmentation)
    found = read_masked(source)
    samples = MaskSamples(found, encoder.canvas, encoder.image_size, known)
    return Read(samples, found.fingerprint, found.names)


def _encode(
    task: TaskName, raw: list[Any], where: Where, known: Target | None, source: object, names: list[str] | None = None
) -> Encoded:
    if task == "multi-label":
        return encode_label_sets(raw, where, known, source)
    if task == "regression":
        return encode_quantities(raw, where, known, source)
    classes = names or sorted_names(set(raw))
    places = {name: place for place, name in enumerate(classes)}
    return encode_classes(np.array([places[each] for each in raw], dtype=np.int64), classes, known, source)


def _samples(dataset: PictureSource, ids: Ints, encoder: ImageEncoder | RawPixels, encoded: Encoded) -> ImageSamples:
    samples = ImageSamples(dataset, ids, encoded.labels, encoder.canvas, encoded.target)
    samples.values = encoded.values
    return samples
