"""Next-token prediction: each token of a packed row is predicted from those before it in its document."""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from data.batch import ImageBatch, TextBatch
from data.errors import UserError
from data.fill_in_middle import fill_in_middle
from data.mixture import Samples
from data.tokenizer import FIM_MIDDLE, FIM_PREFIX, FIM_SUFFIX, load, special_ids
from pretrain.encoders.text import TextEncoder
from pretrain.objectives.protocol import Output
from pretrain.objectives.text import TextObjective, TextSettings
from pretrain.objectives.vocabulary import PredictionHead, token_loss, token_nats


class NextTokenConfig(TextSettings):
    """Settings of next-token prediction."""

    name: Literal["next_token"] = "next_token"
    fill_in_middle: float = Field(default=0.0, ge=0, le=1)
    """Share of the documents whose middle is moved behind their end while training (Bavarian et al. 2022)."""


class MiddleTokens(nn.Module):
    """The ids that rearranging a document needs, on the device, kept with the weights."""

    bos: Tensor
    """int64 scalar, as `eos`."""
    eos: Tensor
    marks: Tensor
    """int64 (3,): before prefix, suffix and middle."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("bos", ()), ("eos", ()), ("marks", (3,))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))

    def read(self, data: Samples) -> None:
        """From the shards' tokenizer; raises `UserError` where it lacks one."""
        tokenizer = load(data.folder)
        found = [tokenizer.token_to_id(mark) for mark in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)]
        if None in found:
            raise UserError(
                f"the tokenizer of {data.folder} lacks {FIM_PREFIX}, {FIM_SUFFIX} or {FIM_MIDDLE}; leave "
                "objective.fill_in_middle out, or shard the text with a tokenizer trained here"
            )
        special = special_ids(tokenizer)
        self.bos.fill_(special["bos"])
        self.eos.fill_(special["eos"])
        self.marks.copy_(torch.tensor(found))


class NextToken(TextObjective):
    """Each token predicted by an encoder that sees only what is before it."""

    causal = True

    def __init__(self, encoder: TextEncoder, config: NextTokenConfig, head: PredictionHead | None = None) -> None:
        super().__init__(encoder, head, config.document_mask)
        self.config = config
        self.middle = MiddleTokens() if config.fill_in_middle else None

    def read(self, data: Samples) -> None:
        """Learn which tokens mark the pieces of a document; raises `UserError` where they are needed and missing."""
        if self.middle is not None:
            self.middle.read(data)

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """Cross-entropy in nats, summed over all tokens of a row but its first.

        Not counted: the begin of a document (nothing before it tells what comes) and padding. So
        `target_count` depends on the data. Metrics: `accuracy`, and `z_loss` where it is on.
        """
        assert isinstance(batch, TextBatch)
        if self.training and self.middle is not None:
            ids = self.middle.bos, self.middle.eos, self.middle.marks
            batch = fill_in_middle(batch, self.config.fill_in_middle, *ids)
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
