"""Several short texts in one row of the network's batch, so that it computes little padding or none."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from pretrain.encoders.attention import GROUP

_WORTH = 0.9
"""Texts are packed where that leaves at most this share of the rows: unpacking has its price too."""


class Packed(NamedTuple):
    """Texts of `b` rows in fewer."""

    tokens: Tensor
    """int64 (rows, n)."""
    documents: Tensor
    """int64 (rows, n): the number of the text, `b` on padding."""
    places: Tensor
    """int64 (b, n): where each token is now, in the rows joined; on padding anywhere."""

    def unpack(self, hidden: Tensor) -> Tensor:
        """Hidden vectors (rows, n, d) back where their tokens were, (b, n, d); on padding any others."""
        flat = rearrange(hidden, "r n d -> (r n) d")
        return rearrange(flat.index_select(0, self.places.flatten()), "(b n) d -> b n d", b=len(self.places))


def pack(tokens: Tensor, documents: Tensor, pad: int) -> Packed | None:
    """Rows of one text each, padded on the right (`documents` is 0 on its tokens), in as few rows as are easily found.

    All in one row without padding, from short to long, where so many are of the same length that attention takes them
    as batches (`Grouped`). Else first fit, the longest first (Johnson 1974): at most 11/9 of the fewest rows, and one;
    None where little is saved.
    """
    real = documents == 0
    lengths = real.sum(dim=1)
    b, n = tokens.shape
    total = int(lengths.sum())
    if total < b * n and GROUP * len(lengths.unique()) <= b:
        order = lengths.argsort(stable=True)
        starts = torch.empty_like(lengths)
        starts[order] = lengths[order].cumsum(0) - lengths[order]
        return _placed(tokens, real, starts, total, pad, rows=1)
    if total > _WORTH * b * n:
        return None
    room: list[int] = []
    starts = torch.empty(b, dtype=torch.int64)
    for text, length in sorted(enumerate(lengths.tolist()), key=lambda pair: -pair[1]):
        row = next((row for row, left in enumerate(room) if left >= length), len(room))
        if row == len(room):
            room.append(n)
        starts[text] = row * n + n - room[row]
        room[row] -= length
    if len(room) > _WORTH * b:
        return None
    return _placed(tokens, real, starts, len(room) * n, pad, rows=len(room))


def _placed(tokens: Tensor, real: Tensor, starts: Tensor, total: int, pad: int, rows: int) -> Packed:
    """The `real` tokens (b, n), each row's from its start (b,) on, in `rows` rows of together `total` tokens."""
    b, n = tokens.shape
    places = torch.where(real, starts[:, None] + torch.arange(n), 0)
    taken = places[real]
    packed = torch.full((total,), pad)
    owners = torch.full_like(packed, b)
    packed[taken] = tokens[real]
    owners[taken] = torch.arange(b)[:, None].expand(b, n)[real]
    return Packed(packed.view(rows, -1), owners.view(rows, -1), places)
