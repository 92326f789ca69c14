"""Labels for new files: pictures, text files, lines from standard input."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.batch import ImageBatch
from data.canvas import decode
from data.errors import UserError
from data.files import write_atomically
from data.images import UnreadableImage
from data.index import IMAGE_PARTS
from finetune.ensemble import Ensemble
from finetune.features import accelerator_for
from finetune.image_encoder import ImageEncoder
from finetune.labelled_text import TEXT_COLUMNS
from finetune.model import TaskModel
from finetune.settings import Settings, settings_from
from finetune.text_encoder import DocumentEncoder

_BATCH = 64


@dataclass(frozen=True)
class Row:
    """One prediction."""

    input: str
    """The file's path, or the text itself."""
    label: str
    """Name of the likeliest class."""
    probability: float
    """The model's probability of it, in [0, 1]."""


@dataclass(frozen=True)
class Predictions:
    """What came out, and what could not be read."""

    rows: list[Row]
    skipped: list[tuple[str, str]]
    """(file, reason) of the inputs left out."""


def predict(model: TaskModel | Ensemble, inputs: Sequence[str | Path], **settings: Any) -> Predictions:
    """Predict each input, in order.

    For pictures, inputs are files and folders (searched to any depth). For text they are files (`.txt`:
    each line is a text; `.tsv`, `.csv`, `.jsonl`: the text column), folders (each `.txt` file is one
    text), `-` for the lines of standard input, or the texts themselves.

    Raises:
        UserError: an input that does not exist, or nothing to predict.
    """
    options = settings_from(settings)
    members = [member.model for member in model.members] if isinstance(model, Ensemble) else [model]
    text = members[0].encoder.kind == "text"
    texts = list(_texts(inputs)) if text else []
    paths = [] if text else list(_pictures(inputs))
    each: list[np.ndarray] = []
    for member in members:
        skipped: list[tuple[str, str]] = []
        names, probabilities = _probabilities(member, texts, paths, skipped, options)
        each.append(probabilities)
    joint = model.mix(each, [member.classes for member in members]) if isinstance(model, Ensemble) else each[0]
    places = joint.argmax(axis=1) if len(joint) else []
    rows = [Row(n, model.classes[p], float(row[p])) for n, row, p in zip(names, joint, places, strict=True)]
    return Predictions(rows, skipped)


def _probabilities(
    model: TaskModel, texts: list[str], paths: list[Path], skipped: list[tuple[str, str]], settings: Settings
) -> tuple[list[str], np.ndarray]:
    """Names of what could be read, and float32 (n, classes); the rest goes into `skipped`."""
    encoder, accelerator = model.encoder, accelerator_for(settings)
    encoder.to(accelerator.device).eval()
    if isinstance(encoder, DocumentEncoder):
        stream = _text_batches(encoder, texts)
    else:
        assert isinstance(encoder, ImageEncoder)
        stream = _image_batches(paths, encoder.canvas, skipped)
    names: list[str] = []
    found = [np.empty((0, len(model.classes)), dtype=np.float32)]
    for part, batch in stream:
        with torch.no_grad(), accelerator.autocast():
            features = encoder(batch.to(accelerator.device))
        names += part
        found.append(model.from_features(features.float().cpu()).numpy())
    return names, np.concatenate(found)


def write_rows(predictions: Predictions, path: Path) -> None:
    """Write rows to a `.csv` or `.jsonl` file, atomically; raises `UserError` for another ending."""
    rows = [row.__dict__ for row in predictions.rows]
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    elif path.suffix == ".csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, ["input", "label", "probability"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    else:
        raise UserError(f"predictions are written as .csv or .jsonl, not to {path}")
    if not path.parent.is_dir():
        raise UserError(f"folder {path.parent} does not exist; make it first")
    write_atomically(path, text)


def _pictures(inputs: Sequence[str | Path]) -> Iterator[Path]:
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.suffix[1:].lower() in IMAGE_PARTS]
            if not found:
                raise UserError(f"{path} holds no pictures ({', '.join(IMAGE_PARTS)})")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise UserError(f"{path} does not exist; give picture files or folders of them")


def _image_batches(
    paths: list[Path], canvas: int, skipped: list[tuple[str, str]]
) -> Iterator[tuple[list[str], ImageBatch]]:
    for start in range(0, len(paths), _BATCH):
        names, images, sizes = [], [], []
        for path in paths[start : start + _BATCH]:
            try:
                pixels, (height, width) = decode(path.read_bytes(), canvas)
            except (OSError, UnreadableImage) as error:
                skipped.append((str(path), str(error)))
                continue
            names.append(str(path))
            images.append(pixels)
            sizes.append((height, width))
        if names:
            ids = torch.arange(len(names))
            batch = ImageBatch(
                images=torch.from_numpy(np.stack(images)),
                sizes=torch.tensor(sizes),
                labels=torch.full_like(ids, -1),
                keys=ids,
                ids=ids,
            )
            yield names, batch


def _text_batches(encoder: DocumentEncoder, texts: list[str]) -> Iterator[tuple[list[str], Any]]:
    if not texts:
        raise UserError("there is no text to predict")
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        ids = torch.arange(len(part))
        yield part, encoder.batch(encoder.tokenize(part), ids, ids)


def _texts(inputs: Sequence[str | Path]) -> Iterator[str]:
    for given in inputs:
        if str(given) == "-":
            yield from _filled(sys.stdin.read().splitlines())
            continue
        path = Path(given).expanduser()
        if _exists(path):
            yield from _texts_of(path)
        elif isinstance(given, Path) or path.suffix in (".txt", ".tsv", ".csv", ".jsonl"):
            raise UserError(f"{path} does not exist; give text files, '-' for standard input, or the texts themselves")
        else:
            yield given


def _texts_of(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise UserError(f"{path} holds no .txt files")
        for file in files:
            yield _read(file).strip()
    elif path.suffix in (".tsv", ".csv", ".jsonl"):
        yield from _column(path)
    else:
        yield from _filled(_read(path).splitlines())


def _column(path: Path) -> Iterator[str]:
    """The text column of a table: the one whose header says so, or the first."""
    lines = _filled(_read(path).splitlines())
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines, start=1):
            try:
                fields = {str(name).lower(): value for name, value in json.loads(line).items()}
                yield next(str(fields[name]) for name in TEXT_COLUMNS if name in fields)
            except (json.JSONDecodeError, AttributeError, StopIteration):
                raise UserError(f"{path}, line {number} is no JSON object with the field 'text'") from None
        return
    rows = list(csv.reader(lines)) if path.suffix == ".csv" else [line.split("\t") for line in lines]
    header = [name.strip().lower() for name in rows[0]] if rows else []
    named = next((header.index(name) for name in TEXT_COLUMNS if name in header), None)
    for row in rows if named is None else rows[1:]:
        yield row[named or 0]


def _filled(lines: list[str]) -> list[str]:
    return [line for line in lines if line.strip()]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace")


def _exists(path: Path) -> bool:
    """Whether it does; a long sentence is no path, and asking the system about it fails."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
