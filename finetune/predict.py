"""Predictions for new inputs, batch by batch: memory does not grow with their number, and their order is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batch import ImageBatch
from data.canvas import decode
from data.crops import upright_size
from data.errors import UserError
from data.images import UnreadableImage
from finetune.alignment import items_at_once
from finetune.dense_predictions import tagged, whole_mask
from finetune.ensemble import Ensemble
from finetune.features import accelerator_for
from finetune.image_encoder import ImageEncoder
from finetune.model import TaskModel
from finetune.prediction_inputs import Picture, pictures, texts
from finetune.prediction_output import written_rows
from finetune.settings import Settings, settings_from
from finetune.targets_class import Classification
from finetune.targets_dense import Segmentation, Tags
from finetune.text_encoder import DocumentEncoder

BATCH = 64


@dataclass(frozen=True)
class Row:
    """One prediction of a class."""

    input: str
    """The file's path, the shard's key, or the text itself."""
    label: str
    """Name of the likeliest class."""
    probability: float
    """The model's probability of it, in [0, 1]."""


@dataclass(frozen=True)
class Skipped:
    """An input that could not be read."""

    input: str
    reason: str


Said = dict[str, Any]
"""A row: `input`, then what the model says of it.

A class has `label` and `probability`; several labels `labels` and `probabilities`; quantities their names; tagged text
`words` and `tags`; a segmented picture `mask` (uint8, of the upright picture's height and width, 255 outside the
square at the centre that the encoder sees) and `shares` of the classes in that square.
"""


@dataclass(frozen=True)
class Predictions:
    """What came out, and what could not be read."""

    rows: list[Row]
    skipped: list[tuple[str, str]]
    """(file, reason) of the inputs left out."""


def predict(model: TaskModel | Ensemble, inputs: Sequence[str | Path], **settings: Any) -> Predictions:
    """Classify each input, in order, all in memory; see `stream`, which is for models of every kind."""
    if not isinstance(model.target, Classification):
        raise UserError(f"predict() gives a class an input; for {model.target.name} take the rows of stream()")
    rows, skipped = [], []
    for found in stream(model, inputs, **settings):
        if isinstance(found, Skipped):
            skipped.append((found.input, found.reason))
        else:
            rows.append(Row(**found))
    return Predictions(rows, skipped)


def stream(
    model: TaskModel | Ensemble,
    inputs: Sequence[str | Path],
    *,
    top: int = 1,
    column: str | None = None,
    **settings: Any,
) -> Iterator[Said | Skipped]:
    """Predict each input, in order, as they are read.

    For what inputs may be see `finetune.prediction_inputs`.

    Args:
        top: classes told of each input, the likeliest first; with more than one a row has `label_2`,
            `probability_2` and so on.
        column: the column of tables that holds the text.

    Raises:
        UserError: an input that does not exist, nothing to predict, or a `top` that the model does not have.
    """
    options = settings_from(settings)
    voices, target = Ensemble.of(model), model.target
    if top != 1 and not isinstance(target, Classification):
        raise UserError(f"only a classification tells its {top} likeliest classes, and the model is for {target.name}")
    if not 1 <= top <= len(model.classes):
        raise UserError(f"{top} classes cannot be told of each input; the model has {len(model.classes)}")
    empty, text = True, voices.kind == "text"
    items: Iterable[Any] = texts(inputs, column) if text else pictures(inputs)
    encoders = [member.model.encoder for member in voices.members]
    sides = {encoder.canvas for encoder in encoders if isinstance(encoder, ImageEncoder)}
    for part in _parts(iter(items)):
        empty = False
        read = part if text else [_decoded(item, sides, target.dense) for item in part]
        good = [each for each in read if not isinstance(each, Skipped)]
        said = _said(voices, good, top, options) if good else iter(())
        for each in read:
            yield each if isinstance(each, Skipped) else {"input": each if text else each.name, **next(said)}
    if empty:
        raise UserError(f"there is no {'text' if text else 'picture'} to predict")


def _parts(items: Iterator[Any]) -> Iterator[list[Any]]:
    while part := list(islice(items, BATCH)):
        yield part


@dataclass(frozen=True)
class _Decoded:
    """A picture on the canvas of each size that some member wants."""

    name: str
    canvases: dict[int, tuple[np.ndarray, tuple[int, int]]]
    size: tuple[int, int] | None
    """Height and width of the picture itself, where that is asked for."""


def _decoded(item: Picture, sides: set[int], sized: bool) -> _Decoded | Skipped:
    name, payload = item
    if isinstance(payload, str):
        return Skipped(name, payload)
    try:
        size = upright_size(payload) if sized else None
        return _Decoded(name, {side: decode(payload, side) for side in sides}, size)
    except UnreadableImage as error:
        return Skipped(name, str(error))


def _said(voices: Ensemble, items: list[Any], top: int, settings: Settings) -> Iterator[Said]:
    """What is said of readable items, in order."""
    if isinstance(voices.target, Tags):
        yield from tagged(voices, items, settings)
        return
    accelerator, models = accelerator_for(settings), [member.model for member in voices.members]
    size = items_at_once(models, len(items))
    for start in range(0, len(items), size):
        here = items[start : start + size]
        joint = voices.mean(model.say(_batch(model, here), accelerator) for model in models)
        yield from _told(voices, here, joint, top)


def _told(voices: Ensemble, items: list[Any], joint: torch.Tensor, top: int) -> Iterator[Said]:
    """What is told of a distribution, item by item."""
    if isinstance(voices.target, Classification):
        yield from _likeliest(joint.numpy(), voices.classes, top)
        return
    decided = voices.target.decision(joint).cpu()
    found = voices.target.predictions(decided)
    if isinstance(voices.target, Segmentation):
        yield from _with_masks(voices.members[0].model, items, decided, found)
    else:
        yield from found


def _likeliest(joint: np.ndarray, classes: list[str], top: int) -> Iterator[Said]:
    """The `top` likeliest classes of each row of probabilities."""
    for row in joint:
        # The first of equal probabilities wins, as in `argmax`.
        order = np.argsort(-row, kind="stable")[:top]
        said: Said = {}
        for rank, place in enumerate(order, start=1):
            behind = f"_{rank}" if rank > 1 else ""
            said |= {f"label{behind}": classes[place], f"probability{behind}": float(row[place])}
        yield said


def _with_masks(model: TaskModel, items: list[_Decoded], decided: torch.Tensor, found: list[Said]) -> Iterator[Said]:
    assert isinstance(model.encoder, ImageEncoder)
    for item, view, said in zip(items, decided, found, strict=True):
        assert item.size is not None
        yield {"mask": whole_mask(view, item.canvases[model.encoder.canvas][1], item.size), **said}


def _batch(model: TaskModel, items: list[Any]) -> Any:
    encoder, ids = model.encoder, torch.arange(len(items))
    if isinstance(encoder, DocumentEncoder):
        return encoder.batch(encoder.tokenize(items), ids, ids)
    assert isinstance(encoder, ImageEncoder)
    decoded = [item.canvases[encoder.canvas] for item in items]
    images = torch.from_numpy(np.stack([pixels for pixels, _ in decoded]))
    sizes = torch.tensor([size for _, size in decoded])
    return ImageBatch(images=images, sizes=sizes, labels=torch.full_like(ids, -1), keys=ids, ids=ids)


def write_rows(predictions: Predictions, path: Path) -> None:
    """Write rows to a `.csv`, `.tsv` or `.jsonl` file, atomically; raises `UserError` for another ending."""
    with written_rows(path) as write:
        for row in predictions.rows:
            write(vars(row))
