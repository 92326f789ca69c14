"""Masked and next-token prediction with one encoder and one head, told apart by the attention mask alone.

After GPT-BERT (Charpentier and Samuel 2024), but with labels unshifted in the masked part, so that the export works
with fill-mask as it is.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from data.batch import ImageBatch, TextBatch
from data.keyed import hash64
from data.mixture import Samples
from pretrain.encoders.text import TextEncoder
from pretrain.objectives.masked_language import MaskedLanguage, MaskedLanguageConfig
from pretrain.objectives.next_token import NextToken, NextTokenConfig
from pretrain.objectives.protocol import Output
from pretrain.objectives.text import TextObjective


class HybridConfig(BaseModel):
    """Settings of the mixture of both."""

    model_config = ConfigDict(extra="forbid")

    encoder_kind: ClassVar = "text"
    name: Literal["hybrid"] = "hybrid"
    causal_share: float = Field(default=0.5, gt=0, lt=1)
    """Chance of a global batch to be causal; or, summed, weight of a causal target (a masked one has the rest)."""
    combine: Literal["alternate", "sum"] = "alternate"
    """Each batch either one or the other, or every batch both, at twice the cost."""
    masked: MaskedLanguageConfig = Field(default_factory=MaskedLanguageConfig)
    """Of the masked part."""
    causal: NextTokenConfig = Field(default_factory=NextTokenConfig)
    """Of the causal part."""


class Hybrid(TextObjective):
    """One encoder that reads both ways; exported as an encoder.

    Both parts' losses are sums over their targets, weighted target by target, so the mean over a global batch does not
    depend on how it is split.
    """

    causal = False

    def __init__(self, encoder: TextEncoder, config: HybridConfig) -> None:
        super().__init__(encoder, document_mask=config.masked.document_mask)
        self.config = config
        masked, causal = MaskedLanguage(encoder, config.masked, self.head), NextToken(encoder, config.causal, self.head)
        # A tuple is no submodule: the shared encoder and head are in the state once, and what else is the parts' own.
        self._parts = masked, causal
        self.table, self.middle = masked.table, causal.middle

    @property
    def masked_part(self) -> MaskedLanguage:
        """Sees both sides."""
        self._parts[0].training = self.training
        return self._parts[0]

    @property
    def causal_part(self) -> NextToken:
        """Sees what is before."""
        self._parts[1].training = self.training
        return self._parts[1]

    def read(self, data: Samples) -> None:
        """As both parts do."""
        self.masked_part.read(data)
        self.causal_part.read(data)

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """The part whose turn it is, or the weighted sum of both: always the sum in evaluation, so that it compares.

        Metrics: `accuracy`, weighted alike.
        """
        share = self.config.causal_share
        if self.training and self.config.combine == "alternate":
            return (self.causal_part if is_causal(progress, share) else self.masked_part)(batch, progress)
        outputs = self.masked_part(batch, progress), self.causal_part(batch, progress)
        weights = (1 - share, share)

        def total(values: list[torch.Tensor]) -> torch.Tensor:
            return weights[0] * values[0] + weights[1] * values[1]

        return Output(
            total([output.loss_sum for output in outputs]),
            total([output.target_count for output in outputs]),
            {"accuracy": total([output.metrics["accuracy"] for output in outputs])},
        )


@torch.compiler.disable
def is_causal(progress: float, share: float) -> bool:
    """Whether the global batch at `progress` is causal: the same for all its microbatches and processes."""
    return int(hash64(int(progress * 2**53), 0xCA)) < share * 2.0**64
