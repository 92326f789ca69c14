"""Next-token prediction: each token of a packed row is predicted from those before it in its document."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from data.batch import ImageBatch, TextBatch
from pretrain.encoders.text import TextEncoder
from pretrain.objectives.protocol import Output
from pretrain.objectives.text import TextObjective
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


class NextToken(TextObjective):
    """Each token predicted by an encoder that sees only what is before it."""

    causal = True

    def __init__(self, encoder: TextEncoder, config: NextTokenConfig, head: PredictionHead | None = None) -> None:
        super().__init__(encoder, head, config.document_mask)
        self.config = config

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """Cross-entropy in nats, summed over all tokens of a row but its first.

        Not counted: the begin of a document (nothing before it tells what comes) and padding. So
        `target_count` depends on the data. Metrics: `accuracy`, and `z_loss` where it is on.
        """
        assert isinstance(batch, TextBatch)
        targets, counted = self.targets(batch.tokens, batch.documents)
        sums = token_loss(
            rearrange(self._predicted(batch), "b n d -> (b n) d"),
            self.decoder_weight,
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

    @torch.no_grad()
    def nats(self, batch: TextBatch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each target, float32 (b, n - 1), and whether it counts, bool (b, n - 1)."""
        targets, counted = self.targets(batch.tokens, batch.documents)
        hidden = rearrange(self._predicted(batch), "b n d -> (b n) d")
        nats = token_nats(hidden, self.decoder_weight, self.head.bias, targets.flatten(), self.config.chunk)
        return nats.view_as(targets), counted

    def _predicted(self, batch: TextBatch) -> Tensor:
        return self.head(self.encode(batch.tokens[:, :-1], batch.documents[:, :-1]))
