"""Which tokens a masked language model has to predict, and what it sees in their place.

Everything is drawn from the rows' keys, so that masks do not depend on batches, processes or restarts. All
shapes depend on the configuration alone, never on the data.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from data.keyed import bits, uniform
from data.vocabulary import Vocabulary

Unit = Literal["token", "word", "span"]


class TokenTable(nn.Module):
    """Facts about token ids on the device, kept with the weights: an export masks as its run did."""

    special: Tensor
    """bool (v,): never masked, never drawn as a replacement."""
    goes_on: Tensor
    """bool (v,): goes on with a word that the token before it left open."""
    open_end: Tensor
    """bool (v,): leaves a word open."""
    ordinary: Tensor
    """int64 (v,): all ids that are not special, then zeros."""
    ordinary_count: Tensor
    """int64 scalar: how many of them there are."""
    mask: Tensor
    """int64 scalar: id of the mask token."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.register_buffer("special", torch.zeros(vocab_size, dtype=torch.bool))
        self.register_buffer("goes_on", torch.zeros(vocab_size, dtype=torch.bool))
        self.register_buffer("open_end", torch.zeros(vocab_size, dtype=torch.bool))
        self.register_buffer("ordinary", torch.zeros(vocab_size, dtype=torch.int64))
        self.register_buffer("ordinary_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.zeros((), dtype=torch.int64))
        self.read(Vocabulary.of_size(vocab_size))

    def read(self, vocabulary: Vocabulary) -> None:
        """Take over the facts; ids of the model beyond the vocabulary count as special."""
        known = len(vocabulary.special)
        special = np.ones(self.vocab_size, dtype=bool)
        special[:known] = vocabulary.special
        ordinary = np.flatnonzero(~special)
        self.special.copy_(torch.from_numpy(special))
        self.goes_on[:known] = torch.from_numpy(vocabulary.goes_on)
        self.open_end[:known] = torch.from_numpy(vocabulary.open_end)
        self.ordinary.zero_()[: len(ordinary)] = torch.from_numpy(ordinary)
        self.ordinary_count.fill_(len(ordinary))
        self.mask.fill_(vocabulary.mask)


def words(tokens: Tensor, documents: Tensor, table: TokenTable) -> Tensor:
    """Number of each token's word within its row, int64 (b, n), from tokens and documents (b, n)."""
    return _runs(table.goes_on[tokens[:, 1:]] & table.open_end[tokens[:, :-1]], documents)


def _runs(joined: Tensor, documents: Tensor) -> Tensor:
    """Number of each token's run, int64 (b, n): a token is `joined` (b, n - 1) to the one before it or begins one.

    A document's first token always begins one.
    """
    begins = ~joined | (documents[:, 1:] != documents[:, :-1])
    return F.pad(begins.long().cumsum(dim=1), (1, 0))


def spans(keys: Tensor, documents: Tensor, mean: float) -> Tensor:
    """Number of each token's span, int64 (b, n): geometric lengths of `mean` tokens (SpanBERT, section 3.1),
    cut at the ends of documents (b, n)."""
    return _runs(uniform(keys, "mask spans", (documents.shape[1] - 1,)) >= 1.0 / mean, documents)


def choose(keys: Tensor, maskable: Tensor, groups: Tensor | None, ratio: float) -> Tensor:
    """The tokens to mask, bool (b, n): of each row the share `ratio` of those that are `maskable`.

    Without `groups` the share is exact, but for rounding up or down at random, so that it is right on average.
    With `groups` (b, n) whole groups are taken, in random order, as long as they fit into that number.
    """
    b, n = maskable.shape
    budget = (maskable.sum(dim=1, keepdim=True) * ratio + uniform(keys, "mask rounding", (1,))).long()
    score = bits(keys, "mask", n)
    if groups is not None:
        score = score.gather(1, groups)
        # Two groups of one score would be taken together; their number settles it.
        score = score * n + groups
    score = torch.where(maskable, score, torch.iinfo(torch.int64).max)
    order = score.argsort(dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(n, device=keys.device).expand(b, -1))
    if groups is not None:
        last = torch.zeros_like(ranks).scatter_reduce_(
            1, groups, torch.where(maskable, ranks, 0), reduce="amax", include_self=True
        )
        ranks = last.gather(1, groups)
    return maskable & (ranks < budget)


def corrupt(tokens: Tensor, chosen: Tensor, keys: Tensor, table: TokenTable, masked: float, replaced: float) -> Tensor:
    """What the model sees, int64 (b, n): of the `chosen` tokens a share `masked` behind the mask token, a share
    `replaced` by ordinary tokens drawn from the whole vocabulary, the rest as they are (BERT, section 3.1)."""
    n = tokens.shape[1]
    if replaced == 0 and masked == 1:
        return torch.where(chosen, table.mask, tokens)
    lot = uniform(keys, "mask corruption", (n,))
    drawn = table.ordinary[(bits(keys, "mask replacement", n) * table.ordinary_count) >> 32]
    seen = torch.where(chosen & (lot < masked), table.mask, tokens)
    return torch.where(chosen & (lot >= masked) & (lot < masked + replaced), drawn, seen)


def places_of(chosen: Tensor, capacity: int) -> Tensor:
    """Where the chosen tokens (b, n) are, int64 (b, capacity), in rising order; then some that are not chosen.

    The shape does not depend on how many are chosen; `capacity` is the most that a row can have.
    """
    return chosen.long().argsort(dim=1, descending=True, stable=True)[:, :capacity]


def gather_chosen(hidden: Tensor, targets: Tensor, chosen: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The places that `places_of` names: hidden vectors (b * capacity, d), targets (b * capacity,), and whether each
    counts."""
    order = places_of(chosen, capacity)
    index = rearrange(order, "b k -> b k 1").expand(-1, -1, hidden.shape[2])
    rows = rearrange(hidden.gather(1, index), "b k d -> (b k) d")
    return rows, rearrange(targets.gather(1, order), "b k -> (b k)"), rearrange(chosen.gather(1, order), "b k -> (b k)")
