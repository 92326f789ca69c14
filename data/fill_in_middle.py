"""Fill in the middle (Bavarian et al. 2022, section 3): a document's middle moves behind its end.

`bos a b c eos` becomes `bos PREFIX a SUFFIX c MIDDLE b eos`, so that a causal model learns to write what stands between
two texts. Which documents, and where they are cut, comes from the row's key.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from data.batch import TextBatch
from data.keyed import uniform

_BOS, _PREFIX_MARK, _PREFIX, _SUFFIX_MARK, _SUFFIX, _MIDDLE_MARK, _MIDDLE, _EOS = range(8)


def fill_in_middle(batch: TextBatch, rate: float, bos: Tensor, eos: Tensor, marks: Tensor) -> TextBatch:
    """The batch with a share `rate` of the documents that begin in a row rearranged, rows cut at their old length.

    Two cuts, each anywhere in the document with equal chance. A document that the row cuts off is rearranged as far
    as the row holds it. Shapes depend on nothing but the batch's.

    Args:
        bos, eos: int64 scalars; marks: int64 (3,), the ids that stand before prefix, suffix and middle.
    """
    tokens, documents = batch.tokens, batch.documents
    b, n = tokens.shape
    index = torch.arange(n, device=tokens.device).expand(b, -1)
    first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    start = torch.where(first, index, 0).cummax(dim=1).values
    ends = (tokens == eos).long()
    body = torch.zeros_like(tokens).scatter_add_(1, start, 1 - ends) - 1  # at each start: tokens without bos and eos
    draws = uniform(batch.keys, "fill in middle", (n, 3))
    cuts = (draws[..., 1:] * (body[..., None] + 1)).long().sort(dim=-1).values
    moved = first & (tokens == bos) & (draws[..., 0] < rate) & (body > 0)

    low, high = (cuts[..., side].gather(1, start) for side in (0, 1))
    offset = index - start - 1
    part = torch.where(offset < low, _PREFIX, torch.where(offset < high, _MIDDLE, _SUFFIX))
    part = torch.where(ends.bool(), _EOS, torch.where(index == start, _BOS, part))
    part = torch.where(moved.gather(1, start), part, _BOS)

    far = torch.iinfo(torch.int64).max
    places = [(start * 8 + part) * n + index]
    for mark in (_PREFIX_MARK, _SUFFIX_MARK, _MIDDLE_MARK):
        places.append(torch.where(moved, (index * 8 + mark) * n, far))
    order = torch.cat(places, dim=1).argsort(dim=1, stable=True)[:, :n]
    values = torch.cat([tokens, *(mark.expand(b, n) for mark in marks)], dim=1)
    numbers = documents.repeat(1, 4)
    return TextBatch(values.gather(1, order), numbers.gather(1, order), batch.keys, batch.ids)
