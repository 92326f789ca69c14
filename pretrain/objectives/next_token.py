"""Next-token prediction: each token of a packed row is predicted from those before it in its document."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from data.batch import ImageBatch, TextBatch
from pretrain.encoders.text import TextEncoder
from pretrain.objectives.protocol import Objective, Output
from pretrain.objectives.vocabulary import PredictionHead, token_loss, token_nats


class NextTokenConfig(BaseModel):
    """Settings of next-token prediction."""

    model_config = ConfigDict(extra="forbid")

    encoder_kind: ClassVar = "text"
    name: Literal["next_token"] = "next_token"
    document_mask: bool = True
    """Whether documents packed into one row are hidden from each other."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-normaliser that keeps logits small (PaLM, section 5); 1e-4 is usual."""
    chunk: int = Field(default=2048, ge=1)
    """Rows of logits held at once."""


class NextToken(Objective):
    """A causal `TextEncoder`, ModernBERT's prediction head and a decoder tied to the embedding."""

    encoder: TextEncoder

    def __init__(self, encoder: TextEncoder, config: NextTokenConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.head = PredictionHead(encoder.config)

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """Cross-entropy in nats, summed over all tokens of a row but its first.

        Not counted: the begin of a document (nothing before it tells what comes) and padding. So
        `target_count` depends on the data. Metrics: `accuracy`, and `z_loss` where it is on.
        """
        assert isinstance(batch, TextBatch)
        targets, counted = self.targets(batch.tokens, batch.documents)
        sums = token_loss(
            rearrange(self._predict(batch.tokens[:, :-1], batch.documents[:, :-1]), "b n d -> (b n) d"),
            self.encoder.embeddings.tok_embeddings.weight,
            self.head.bias,
            rearrange(targets, "b n -> (b n)"),
            rearrange(counted, "b n -> (b n)"),
            chunk=self.config.chunk,
            z_loss=self.config.z_loss,
        )
        metrics = {"accuracy": sums.correct} | ({"z_loss": sums.z_loss} if self.config.z_loss else {})
        return Output(sums.loss, counted.sum().float(), metrics)

    def targets(self, tokens: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        """The token after each of the first `n - 1` (b, n - 1) and whether it counts, bool (b, n - 1)."""
        targets = tokens[:, 1:]
        same = documents[:, 1:] == documents[:, :-1]
        return targets, same & (targets != self.encoder.config.pad_token)

    def logits(self, tokens: Tensor, documents: Tensor | None = None, last: int | None = None) -> Tensor:
        """Scores of every next token (b, n, vocabulary), for all positions or only the `last` few."""
        hidden = self._predict(tokens, documents, last)
        return F.linear(hidden, self.encoder.embeddings.tok_embeddings.weight, self.head.bias)

    @torch.no_grad()
    def nats(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target, float32 (b, n - 1), and whether it counts, bool (b, n - 1)."""
        targets, counted = self.targets(batch.tokens, batch.documents)
        hidden = self._predict(batch.tokens[:, :-1], batch.documents[:, :-1])
        weight = self.encoder.embeddings.tok_embeddings.weight
        nats = token_nats(hidden.flatten(0, 1), weight, self.head.bias, targets.flatten(), self.config.chunk)
        return nats.view_as(targets), counted

    def _predict(self, tokens: Tensor, documents: Tensor | None, last: int | None = None) -> Tensor:
        hidden = self.encoder(tokens, documents if self.config.document_mask else None, causal=True)
        return self.head(hidden if last is None else hidden[:, -last:])
