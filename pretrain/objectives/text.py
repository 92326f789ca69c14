"""What objectives over text have in common: an encoder, a prediction head, a decoder tied to the embedding."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from pretrain.encoders.text import TextEncoder
from pretrain.objectives.protocol import Objective
from pretrain.objectives.vocabulary import PredictionHead


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
