"""What objectives over text have in common: an encoder, a prediction head, a decoder tied to the embedding."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from pretrain.encoders.text import TextEncoder
from pretrain.objectives.protocol import Objective
from pretrain.objectives.vocabulary import PredictionHead


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
