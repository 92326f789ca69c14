"""How like the pre-training data the task's data look to the encoder: the proxy A-distance.

A linear classifier is trained to tell the two apart by their features; with a held-out error e the distance is
`2 (1 - 2 e)`: 0 where they cannot be told apart, 2 where always (Ben-David et al. 2006, "Analysis of
representations for domain adaptation", section 5; a bound on the loss by moving between domains holds with it).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.dataset import ShardedDataset
from data.errors import UserError
from data.keyed import hash64
from finetune.encoder import Encoder
from finetune.evidence import wilson
from finetune.features import accelerator_for, extract
from finetune.image_encoder import ImageEncoder
from finetune.probe import fit_linear
from finetune.samples import ImageSamples, Samples, TextSamples
from finetune.settings import Settings
from finetune.tasks import Task
from finetune.text_encoder import DocumentEncoder

MOST = 1000
"""Samples compared of each side."""
SCALE = ((0.3, "hardly to be told apart"), (0.9, "related"), (1.5, "different"), (2.1, "far apart"))
"""Upper ends of the distance, and what is said of it; our words, not the paper's."""
SOURCE = "proxy A-distance, Ben-David et al. 2006 (Analysis of representations for domain adaptation)"


def similarity(encoder: Encoder, task: Task, pretraining: str | Path, settings: Settings) -> dict[str, Any]:
    """The distance between the shards and the task's training samples, with its 95 % interval, and in words.

    Text is compared in pieces of the same lengths: otherwise length alone would tell the two apart.

    Raises:
        UserError: the shards are missing or of another kind than the encoder's.
    """
    target = task.train.select(_some(len(task.train), 1))
    source = _images(encoder, pretraining) if isinstance(encoder, ImageEncoder) else None
    if isinstance(encoder, DocumentEncoder):
        assert isinstance(target, TextSamples)
        source = _pieces(encoder, pretraining, target)
    if source is None:
        raise UserError("this encoder's features cannot be compared with shards; leave --pretraining out")
    accelerator = accelerator_for(settings)
    ours, theirs = (extract(encoder, samples, settings, accelerator).numpy() for samples in (source, target))
    return distance(ours, theirs)


def distance(source: NDArray[np.float32], target: NDArray[np.float32]) -> dict[str, Any]:
    """The distance of features (n, d) and (m, d): half of each side trains the classifier, half judges it."""
    count = min(len(source), len(target))
    features = torch.from_numpy(np.concatenate([source[:count], target[:count]]))
    sides = torch.arange(2).repeat_interleave(count)
    training = torch.arange(2 * count) % 2 == 0
    head, _ = fit_linear(features[training], sides[training], 2, 0)
    with torch.no_grad():
        right = head(features[~training]).argmax(dim=1) == sides[~training]
    low, high = wilson(int(right.sum()), len(right))
    value, bounds = _distance(float(right.double().mean())), [_distance(low), _distance(high)]
    words = next(words for end, words in SCALE if value <= end)
    about = {"distance": value, "interval": bounds, "words": words, "told_apart": float(right.double().mean())}
    return about | {"samples": count, "source": SOURCE}


def _distance(accuracy: float) -> float:
    return max(0.0, 2 * (2 * accuracy - 1))


def _some(count: int, side: int = 0) -> NDArray[np.int64]:
    """Up to `MOST` positions in random order, another one for each side: the two may be the same data."""
    return np.argsort(hash64(side, 0x51A1, np.arange(count)), kind="stable")[:MOST].astype(np.int64)


def _images(encoder: ImageEncoder, pretraining: str | Path) -> Samples:
    dataset = ShardedDataset(pretraining, kind="images", context=1)
    ids = dataset.all_ids()[_some(len(dataset))]
    return ImageSamples(dataset, ids, np.zeros(len(ids), dtype=np.int64), encoder.canvas)


def _pieces(encoder: DocumentEncoder, pretraining: str | Path, target: TextSamples) -> Samples:
    """Cuts of the token stream as long as the target's texts, between begin and end marks."""
    lengths = [len(target.rows[i]) - 2 for i in target.ids]
    room = max(1, *lengths)
    dataset = ShardedDataset(pretraining, kind="text", context=room)
    if dataset.manifest.get("vocab_size", encoder.tokenizer.get_vocab_size()) != encoder.tokenizer.get_vocab_size():
        raise UserError(f"{pretraining} was sharded with another tokenizer than the encoder's; give its own shards")
    streams = dataset.rows(dataset.all_ids()[_some(len(dataset))])
    marks = (encoder.bos, encoder.eos, encoder.pad)
    rows = [
        _piece(stream, length, marks) for stream, length in zip(streams, _repeat(lengths, len(streams)), strict=True)
    ]
    return TextSamples(rows, np.zeros(len(rows), dtype=np.int64), encoder)


def _piece(stream: NDArray[np.int64], length: int, marks: tuple[int, int, int]) -> NDArray[np.int64]:
    text = stream[~np.isin(stream, marks)][:length]
    return np.array([marks[0], *text, marks[1]], dtype=np.int64)


def _repeat(values: Sequence[int], count: int) -> list[int]:
    return [values[i % len(values)] for i in range(count)]
