"""Bits per byte: how well a text model compresses, comparable across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.batch import TextBatch
from pretrain.objectives.next_token import NextToken

Ints = NDArray[np.int64]


@torch.no_grad()
def byte_sums(objective: NextToken, batch: TextBatch, token_bytes: Tensor) -> Tensor:
    """Nats and bytes over the batch's targets that stand for text: float64 (2,), to be summed over batches.

    `token_bytes`, int64 (vocabulary,), is `data.tokenizer.token_bytes` on the batch's device. Special tokens
    stand for no bytes and drop out, as do targets that the objective does not count.
    """
    nats, counted = objective.nats(batch)
    sizes = torch.where(counted, token_bytes[batch.tokens[:, 1:]], 0)
    return torch.stack([nats.double()[sizes > 0].sum(), sizes.sum().double()])


def bits_per_byte(objective: NextToken, batches: Iterable[TextBatch], token_bytes: Ints) -> float:
    """Nats of all text targets, divided by ln 2 and by the bytes that these targets stand for."""
    device = next(objective.parameters()).device
    sizes = torch.as_tensor(token_bytes, device=device)
    training = objective.training
    objective.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        sums += byte_sums(objective, batch.to(device), sizes)
    objective.train(training)
    nats, size = sums.tolist()
    return nats / math.log(2) / size


class KneserNeyBigram:
    """Interpolated Kneser-Ney bigram over token ids (Chen and Goodman 1999, section 2.7): the bar to clear.

    Absolute discounting of pair counts, backed off to the number of different tokens that precede each token,
    itself discounted towards uniform; each discount is n1 / (n1 + 2 n2) from counts of counts.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def fit(self, rows: Iterable[NDArray[np.integer]], bos: int) -> Self:
        """Count the pairs in arrays of token ids (n,) or (b, n), but for those that end in `bos`."""
        pairs = np.concatenate([self._pairs(row, bos) for row in rows])
        self.bos = bos
        self.codes, counts = np.unique(pairs, return_counts=True)
        discount = _discount(counts)
        first, second = np.divmod(self.codes, self.vocab_size)
        self.kept = counts - discount
        self.context_count = np.bincount(first, weights=counts, minlength=self.vocab_size)
        self.backoff = discount * np.bincount(first, minlength=self.vocab_size)
        before = np.bincount(second, minlength=self.vocab_size)
        lower = _discount(before[before > 0])
        freed = lower * np.count_nonzero(before)
        self.continuation = (np.maximum(before - lower, 0) + freed / self.vocab_size) / before.sum()
        return self

    def probability(self, first: Ints, second: Ints) -> NDArray[np.float64]:
        """P(second | first), float64, elementwise over two arrays of ids of one shape."""
        codes = first * self.vocab_size + second
        place = np.minimum(np.searchsorted(self.codes, codes), len(self.codes) - 1)
        kept = np.where(self.codes[place] == codes, self.kept[place], 0.0)
        count, back = self.context_count[first], self.backoff[first]
        unseen = count == 0
        count, back = np.where(unseen, 1.0, count), np.where(unseen, 1.0, back)
        return (kept + back * self.continuation[second]) / count

    def bits_per_byte(self, rows: Iterable[NDArray[np.integer]], token_bytes: Ints) -> float:
        """Of rows (n,) or (b, n), over the same targets as the function above: all but each row's first."""
        nats, size = 0.0, 0
        for row in rows:
            first, second = np.divmod(self._pairs(row, self.bos), self.vocab_size)
            text = token_bytes[second] > 0
            nats -= float(np.log(self.probability(first[text], second[text])).sum())
            size += int(token_bytes[second].sum())
        return nats / math.log(2) / size

    def _pairs(self, row: NDArray[np.integer], bos: int) -> Ints:
        row = np.asarray(row, dtype=np.int64)
        first, second = row[..., :-1].ravel(), row[..., 1:].ravel()
        return (first * self.vocab_size + second)[second != bos]


def _discount(counts: NDArray[np.integer]) -> float:
    ones, twos = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
    return ones / (ones + 2 * twos) if ones and twos else 0.5
