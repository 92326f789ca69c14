"""What a model says of every word of new texts, and of every pixel of new pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.features import accelerator_for
from finetune.masks import UNKNOWN
from finetune.model import TaskModel
from finetune.settings import Settings
from finetune.text_encoder import DocumentEncoder
from pretrain.views import center_boxes

_ROWS = 64
"""Rows of tokens a step."""


def tagged(model: TaskModel, texts: Sequence[str], settings: Settings) -> Iterator[dict[str, Any]]:
    """`words` (what stands between spaces) and `tags` of each text, in order.

    A word for which the tokenizer has no token has the tag None. Texts longer than the context are cut between
    words, as in training.
    """
    encoder = model.encoder
    assert isinstance(encoder, DocumentEncoder)
    words = [text.split() for text in texts]
    tags: list[list[str | None]] = [[] for _ in texts]
    pieces = [(i, *piece) for i, each in enumerate(words) if each for piece in encoder.tokenize_words(each)]
    for start in range(0, len(pieces), _ROWS):
        part = pieces[start : start + _ROWS]
        ids = torch.arange(len(part))
        decided = decide(model, encoder.batch([row for _, row, _ in part], ids, ids), settings)
        for (i, _, firsts), said in zip(part, decided.tolist(), strict=True):
            tags[i] += [model.classes[said[first]] if first >= 0 else None for first in firsts]
    for each, found in zip(words, tags, strict=True):
        yield {"words": each, "tags": found}


@torch.no_grad()
def decide(model: TaskModel, batch: Any, settings: Settings) -> Tensor:
    """The target's decisions about a batch, on the CPU; the encoder is on the accelerator's device already."""
    accelerator = accelerator_for(settings)
    with accelerator.autocast():
        features: Tensor = model.encoder(batch.to(accelerator.device), dense=model.target.dense)
    return model.target.decide(model.logits(features.float().cpu()))


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
