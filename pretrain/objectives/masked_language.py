"""Masked language modelling (Devlin et al. 2019): hidden tokens are predicted from both sides."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from data.batch import ImageBatch, TextBatch
from data.mixture import Samples
from data.tokenizer import load
from data.vocabulary import Vocabulary
from pretrain.encoders.text import TextEncoder
from pretrain.objectives.masking import TokenTable, Unit, choose, corrupt, gather_chosen, spans, words
from pretrain.objectives.protocol import Output
from pretrain.objectives.text import TextObjective, TextSettings
from pretrain.objectives.vocabulary import PredictionHead, token_loss, token_nats


class MaskedLanguageConfig(TextSettings):
    """Settings of masked language modelling."""

    name: Literal["masked_language"] = "masked_language"
    mask_ratio: float = Field(default=0.3, gt=0, lt=1)
    """Share of the ordinary tokens to predict (ModernBERT, section 2.2); special tokens are never masked."""
    final_mask_ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share at the end of training, reached in a straight line; without it the share stays."""
    masked: float = Field(default=1.0, ge=0, le=1)
    """Share of these that the mask token hides; 0.8 in BERT."""
    replaced: float = Field(default=0.0, ge=0, le=1)
    """Share of these that become random tokens; 0.1 in BERT. The rest stays as it is."""
    unit: Unit = "token"
    """What is hidden as a whole: tokens, words, or spans of random length."""
    span: float = Field(default=3.0, ge=1)
    """Mean length of a span, in tokens."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.masked + self.replaced > 1 + 1e-9:
            raise ValueError(f"masked {self.masked} and replaced {self.replaced} add up to more than 1")
        return self

    def ratio(self, progress: float) -> float:
        """The share of tokens to predict when the share `progress` of training is done."""
        end = self.mask_ratio if self.final_mask_ratio is None else self.final_mask_ratio
        return min(self.mask_ratio + (end - self.mask_ratio) * progress, self.most)

    @property
    def most(self) -> float:
        """The largest ratio of the whole run."""
        return max(self.mask_ratio, self.final_mask_ratio or 0.0)

    def capacity(self, length: int) -> int:
        """The most tokens of a row of `length` that are ever chosen."""
        return min(length, math.floor(length * self.most) + 1)


class MaskedLanguage(TextObjective):
    """Tokens hidden from an encoder that sees both sides.

    Labels are not shifted: position i predicts token i, as transformers' fill-mask expects.
    """

    causal = False

    def __init__(self, encoder: TextEncoder, config: MaskedLanguageConfig, head: PredictionHead | None = None) -> None:
        super().__init__(encoder, head, config.document_mask)
        self.config = config
        self.table = TokenTable(encoder.config.vocab_size)

    def read(self, data: Samples) -> None:
        """Learn from the tokenizer which ids are special and where words begin."""
        self.table.read(Vocabulary.of(load(data.folder)))

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """Cross-entropy in nats, summed over the chosen tokens. Metrics: `accuracy`, and `z_loss` where on."""
        assert isinstance(batch, TextBatch)
        hidden, targets, counted = self.predicted(batch, progress)
        sums = token_loss(
            hidden,
            self.decoder_weight,
            self.head.bias,
            targets,
            counted,
            chunk=self.config.chunk,
            z_loss=self.config.z_loss,
        )
        metrics = {"accuracy": sums.correct} | ({"z_loss": sums.z_loss} if self.config.z_loss else {})
        return Output(sums.loss, counted.sum().float(), metrics)

    def masked(self, batch: TextBatch, progress: float) -> tuple[Tensor, Tensor]:
        """What the encoder sees, int64 (b, n), and which of the first n tokens of each row it has to predict.

        A row's last token begins the next row, and is left to that.
        """
        tokens, documents = batch.tokens[:, :-1], batch.documents[:, :-1]
        config, groups = self.config, None
        if config.unit == "word":
            groups = words(tokens, documents, self.table)
        elif config.unit == "span":
            groups = spans(batch.keys, documents, config.span)
        chosen = choose(batch.keys, ~self.table.special[tokens], groups, config.ratio(progress))
        return corrupt(tokens, chosen, batch.keys, self.table, config.masked, config.replaced), chosen

    def predicted(self, batch: TextBatch, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors to predict from (k, d), the true tokens (k,) and whether each counts (k,), of chosen tokens only.

        k depends on the shape of the batch alone; the places that are left over do not count.
        """
        return self.hidden_targets(*self.masked(batch, progress), batch)

    def hidden_targets(self, seen: Tensor, chosen: Tensor, batch: TextBatch) -> tuple[Tensor, Tensor, Tensor]:
        """The same from what `masked` gave."""
        hidden = self.encode(seen, batch.documents[:, :-1])
        capacity = self.config.capacity(seen.shape[1])
        rows, targets, counted = gather_chosen(hidden, batch.tokens[:, :-1], chosen, capacity)
        return self.head(rows), targets, counted

    @torch.no_grad()
    def nats(self, batch: TextBatch, progress: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of each chosen token, float32 (k,), the tokens (k,), and whether each counts (k,)."""
        hidden, targets, counted = self.predicted(batch, progress)
        nats = token_nats(hidden, self.decoder_weight, self.head.bias, targets, self.config.chunk)
        return nats, targets, counted
