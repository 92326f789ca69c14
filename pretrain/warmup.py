"""Global batches and contexts that grow: pure functions of how far training is."""

from __future__ import annotations

import math

import torch
from einops import rearrange, repeat
from pydantic import BaseModel, ConfigDict, Field

from data.batch import TextBatch
from data.keyed import bits


class BatchWarmup(BaseModel):
    """A global batch that grows in a straight line, in whole multiples of its first size."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(gt=0)
    """Samples of the first batches; divides `batch_size`, and divides over the processes."""
    samples: int = Field(gt=0)
    """Samples after which the batch has its full size (GPT-3, section 2.3, counts so, in tokens)."""

    def size(self, position: int, full: int) -> int:
        """Samples of the global batch that begins at `position`, `full` behind the warm-up."""
        if position >= self.samples:
            return full
        return self.start + int((full - self.start) * position / self.samples) // self.start * self.start

    def steps(self, samples: float, full: int) -> int:
        """Batches nearest to `samples` samples in all."""
        position = steps = 0
        while position < min(self.samples, samples):
            position, steps = position + self.size(position, full), steps + 1
        return steps + max(0, round((samples - position) / full))


class ContextWarmup(BaseModel):
    """Rows of text cut into shorter ones at first; as many tokens a batch (Li et al. 2022, section 4)."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(ge=2)
    """Tokens of the first rows; doubles until it is the encoder's context."""
    share: float = Field(gt=0, le=1)
    """Share of training with less than the whole context, in equal parts for each length."""

    def pieces(self, progress: float, context: int) -> int:
        """Rows that a row of `context` tokens is cut into at `progress`: a power of two, at last 1."""
        doublings = round(math.log2(context / self.start))
        return 2 ** max(0, doublings - int(progress / self.share * doublings))

    def fits(self, context: int) -> bool:
        """Whether doublings of the start meet the context."""
        doublings = round(math.log2(context / self.start)) if context > self.start else 0
        return doublings > 0 and self.start * 2**doublings == context


def cut(batch: TextBatch, pieces: int) -> TextBatch:
    """Rows (b, n + 1) as rows (b * pieces, n / pieces + 1), in order, each with a key of its own.

    As rows of a dataset do, each begins with the token that the one before ends with: no target is lost.
    """
    if pieces == 1:
        return batch
    length = (batch.tokens.shape[1] - 1) // pieces
    keys = bits(batch.keys, "pieces of a row", 2 * pieces)
    high, low = keys[:, :pieces], keys[:, pieces:]
    return TextBatch(
        tokens=rearrange(batch.tokens.unfold(1, length + 1, length), "b pieces n -> (b pieces) n"),
        documents=rearrange(batch.documents.unfold(1, length + 1, length), "b pieces n -> (b pieces) n"),
        keys=rearrange(torch.bitwise_or(torch.bitwise_left_shift(high, 32), low), "b pieces -> (b pieces)"),
        ids=repeat(batch.ids, "b -> (b pieces)", pieces=pieces),
    )
