"""What a model says of every word of new texts, and of every pixel of new pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.ensemble import Ensemble
from finetune.features import accelerator_for
from finetune.masks import UNKNOWN
from finetune.model import TaskModel
from finetune.settings import Settings
from finetune.text_encoder import DocumentEncoder
from pretrain.views import center_boxes

_ROWS = 64
"""Rows of tokens a step."""


def tagged(model: Ensemble, texts: Sequence[str], settings: Settings) -> Iterator[dict[str, Any]]:
    """`words` (what stands between spaces) and `tags` of each text, in order.

    A word for which no member's tokenizer has a token has the tag None. Texts longer than the context are cut between
    words, as in training.
    """
    words = [text.split() for text in texts]
    each = [_spoken(member.model, words, settings) for member in model.members]
    known = torch.stack([here for _, here in each]).any(dim=0).tolist()
    numbers = model.target.decision(model.mean(said for said, _ in each)).tolist()
    tags = (model.classes[number] if here else None for number, here in zip(numbers, known, strict=True))
    for text in words:
        yield {"words": text, "tags": list(islice(tags, len(text)))}


def _spoken(model: TaskModel, words: list[list[str]], settings: Settings) -> tuple[Tensor, Tensor]:
    """Of all words of all texts, one after the other: the probabilities (words, tags), on the CPU, and whether (words,)
    the tokenizer has a token for them; equal probabilities where it has none."""
    encoder, accelerator = model.encoder, accelerator_for(settings)
    assert isinstance(encoder, DocumentEncoder)
    starts = np.cumsum([0, *map(len, words)])
    said = torch.full((int(starts[-1]), model.target.outputs), 1 / model.target.outputs)
    known = torch.zeros(len(said), dtype=torch.bool)
    pieces = []
    for start, each in zip(starts.tolist(), words, strict=False):
        for row, firsts in encoder.tokenize_words(each) if each else ():
            pieces.append((start, row, firsts))
            start += len(firsts)
    for first in range(0, len(pieces), _ROWS):
        part = pieces[first : first + _ROWS]
        ids = torch.arange(len(part))
        spoken = model.say(encoder.batch([row for _, row, _ in part], ids, ids), accelerator).cpu()
        for (start, _, firsts), row in zip(part, spoken, strict=True):
            places = torch.tensor(firsts)
            here = start + torch.nonzero(places >= 0)[:, 0]
            said[here], known[here] = row[places[places >= 0]], True
    return said, known


def whole_mask(view: Tensor, canvas: tuple[int, int], picture: tuple[int, int]) -> NDArray[np.uint8]:
    """The classes of a centre view's pixels as a mask of the whole picture: the nearest pixels' classes.

    Args:
        view: int64 (size, size), of the largest square at the centre.
        canvas: height and width of the picture as the encoder's view was cut from it.
        picture: height and width of the mask, which is uint8 and `UNKNOWN` where the view did not reach.
    """
    top, left, side, _ = center_boxes(torch.tensor([canvas]))[0].tolist()
    size = len(view)
    known, places = [], []
    for start, small, large in ((top, canvas[0], picture[0]), (left, canvas[1], picture[1])):
        at = ((np.arange(large) + 0.5) * small / large - start) * size / side
        known.append((at >= 0) & (at < size))
        places.append(at.clip(0, size - 1).astype(np.int64))
    mask = view.numpy().astype(np.uint8)[places[0][:, None], places[1]]
    mask[~(known[0][:, None] & known[1])] = UNKNOWN
    return mask
