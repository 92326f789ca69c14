"""Whether two sets of labelled items hold the same things: equal content, or the same pictures or texts changed a
little."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.advise.duplicates import digests
from finetune.samples import Samples, TextSamples

SIDE = 8
"""Pixels a side of the thumbnails that pictures are compared by: noise and re-encoding hardly show in them."""
ALIKE = 0.9
"""Correlation of two thumbnails from which on they show the same picture, if each is the other's nearest."""
_CHUNK = 1024


@dataclass(frozen=True)
class Overlap:
    """Of two sets, the shares of the first that the second has, too."""

    equal: float
    """With the same content: decoded pixels, or tokens."""
    near: float
    """With nearly the same: re-encoded, noisy, blurred, darker; texts in other case and punctuation."""


def overlap(first: Samples, second: Samples) -> Overlap:
    """How much of `first` is in `second`; labels are not compared."""
    if not len(first) or not len(second):
        return Overlap(0.0, 0.0)
    known = set(digests(second))
    equal = float(np.mean([digest in known for digest in digests(first)]))
    if isinstance(first, TextSamples) and isinstance(second, TextSamples):
        words = set(_words(second))
        return Overlap(equal, float(np.mean([text in words for text in _words(first)])))
    return Overlap(equal, _mutual(_thumbnails(first), _thumbnails(second)))


def _words(samples: TextSamples) -> list[str]:
    """Each text in small letters without anything but letters and digits."""
    decode = samples.encoder.tokenizer.decode
    texts = (decode(samples.rows[i].tolist(), skip_special_tokens=True) for i in samples.ids)
    return ["".join(sign for sign in text.lower() if sign.isalnum()) for text in texts]


def _thumbnails(samples: Samples) -> Tensor:
    """float32 (n, 3 * SIDE * SIDE): thumbnails without mean, of length one."""
    found = torch.zeros(len(samples), 3 * SIDE * SIDE)
    for positions, batch in samples.batches(256):
        for position, image, (height, width) in zip(positions, batch.images, batch.sizes.tolist(), strict=True):
            small = F.interpolate(image[None, :, :height, :width].float(), (SIDE, SIDE), mode="area")
            found[position] = small.flatten()
    return F.normalize(found - found.mean(dim=1, keepdim=True), dim=1)


def _mutual(one: Tensor, two: Tensor) -> float:
    """Share of `one` whose nearest in `two` is alike and has it as its own nearest."""
    forth, values = _nearest(one, two)
    back, _ = _nearest(two, one)
    mutual = back[forth] == torch.arange(len(one))
    return float((mutual & (values >= ALIKE)).float().mean())


def _nearest(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    best = [(part @ two.T).max(dim=1) for part in one.split(_CHUNK)]
    return torch.cat([each.indices for each in best]), torch.cat([each.values for each in best])
