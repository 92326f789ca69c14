"""What objectives over text have in common: an encoder, a prediction head, a decoder tied to the embedding."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from einops import rearrange, repeat
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from data.batch import TextBatch
from pretrain.encoders.text import TextEncoder
from pretrain.objectives.protocol import Objective
from pretrain.objectives.vocabulary import PredictionHead

_KEY_STEP = 0x1E3779B97F4A7C15
"""Between the keys of a row's pieces; odd, so that they differ."""


class TextSettings(BaseModel):
    """Settings that all objectives over text share."""

    model_config = ConfigDict(extra="forbid")

    encoder_kind: ClassVar = "text"
    document_mask: bool = True
    """Whether documents packed into one row are hidden from each other."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-normaliser that keeps logits small (PaLM, section 5); 1e-4 is usual."""
    chunk: int = Field(default=2048, ge=1)
    """Rows of logits held at once."""
    context_start: int | None = Field(default=None, ge=2)
    """Tokens of a row at first, doubled until rows are whole; the tokens of a batch stay as many (Li et al. 2022)."""
    context_warmup: float = Field(default=0.25, gt=0, le=1)
    """Share of training until rows are whole, where `context_start` is given."""

    def length(self, progress: float, whole: int) -> int:
        """Tokens of a row when the share `progress` of training is done, of rows that are `whole` in the end."""
        if self.context_start is None or progress >= self.context_warmup:
            return whole
        doublings = math.ceil(math.log2(max(whole / self.context_start, 1)))
        return min(whole, self.context_start * 2 ** int(doublings * progress / self.context_warmup))


def shorten(batch: TextBatch, length: int) -> TextBatch:
    """Rows of n + 1 tokens cut into rows of `length` + 1, each piece's last token the first of the next.

    The order of samples does not know of it, so positions stay what they are. A rest shorter than `length` is left out.
    """
    n = batch.tokens.shape[1] - 1
    if length >= n:
        return batch
    pieces = [rearrange(x.unfold(1, length + 1, length), "b k n -> (b k) n") for x in (batch.tokens, batch.documents)]
    number = torch.arange(n // length, device=batch.keys.device)
    keys = rearrange(batch.keys[:, None] + number * _KEY_STEP, "b k -> (b k)")
    ids = repeat(batch.ids, "b -> (b k)", k=len(number))
    return TextBatch(tokens=pieces[0], documents=pieces[1], keys=keys, ids=ids)


class TextObjective(Objective):
    """A `TextEncoder`, ModernBERT's prediction head and a decoder whose weight is the embedding's."""

    encoder: TextEncoder
    causal: ClassVar[bool]
    """Whether the exported model sees only what is before a token (a decoder), or both sides (an encoder)."""

    def __init__(self, encoder: TextEncoder, head: PredictionHead | None = None, document_mask: bool = True) -> None:
        """`head` is one that another objective shares; `document_mask` hides packed documents from each other."""
        super().__init__()
        self.encoder = encoder
        self.head = head if head is not None else PredictionHead(encoder.config)
        self.document_mask = document_mask

    def encode(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """Hidden vectors (b, n, d) of token ids (b, n)."""
        return self.encoder(tokens, documents if self.document_mask else None, causal=self.causal)

    def logits(self, tokens: Tensor, documents: Tensor | None = None, last: int | None = None) -> Tensor:
        """Scores at every position (b, n, vocabulary), or only at the `last` few: of the next token if causal, else
        of the token itself."""
        hidden = self.encode(tokens, documents)
        hidden = self.head(hidden if last is None else hidden[:, -last:])
        return F.linear(hidden, self.decoder_weight, self.head.bias)

    @property
    def decoder_weight(self) -> Tensor:
        """(v, d), the embedding's own."""
        return self.encoder.embeddings.tok_embeddings.weight
