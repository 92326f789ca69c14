"""Replaced-token detection (ELECTRA: Clark et al. 2020): a small generator fills in hidden tokens, and the encoder
tells, for every token, whether it is the original."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from data.batch import ImageBatch, TextBatch
from data.keyed import uniform
from data.mixture import Samples
from pretrain.encoders.text import TextConfig, TextEncoder, initialise
from pretrain.objectives.masked_language import MaskedLanguage, MaskedLanguageConfig
from pretrain.objectives.masking import places_of
from pretrain.objectives.protocol import Objective, Output
from pretrain.objectives.vocabulary import sample_tokens, token_loss


def _masking() -> MaskedLanguageConfig:
    return MaskedLanguageConfig(mask_ratio=0.15)


class ReplacedTokenConfig(BaseModel):
    """Settings of replaced-token detection."""

    model_config = ConfigDict(extra="forbid")

    encoder_kind: ClassVar = "text"
    name: Literal["replaced_token"] = "replaced_token"
    generator: MaskedLanguageConfig = Field(default_factory=_masking)
    """What the generator predicts; 15 % of the tokens as published."""
    generator_depth: int | None = Field(default=None, ge=1)
    """Layers of the generator, as wide as the encoder; without it half of the encoder's (DeBERTaV3, section 4.1)."""
    weight: float = Field(default=50.0, gt=0)
    """Of the detector's mean loss a token beside the generator's mean loss a hidden token (ELECTRA, section 3.1)."""


class ReplacedToken(Objective):
    """The encoder as a detector of what a generator, which shares its embedding, made up.

    Both are trained together; no gradient flows through the sampled tokens. The paper adds two means over different
    targets, hidden tokens and all tokens. As the former are the share `mask_ratio` of the latter, exactly so on
    average, a sum over the latter times that share makes one sum over one count of both.
    """

    encoder: TextEncoder
    causal: ClassVar[bool] = False

    def __init__(self, encoder: TextEncoder, config: ReplacedTokenConfig) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        depth = config.generator_depth or max(1, encoder.config.depth // 2)
        generator = TextEncoder(encoder.config.model_copy(update={"depth": depth}))
        generator.embeddings = encoder.embeddings
        masked = MaskedLanguage(generator, config.generator)
        # A tuple is no submodule: the shared embedding is in the state once, and what else is the generator's own.
        self._generator = (masked,)
        self.generator_layers, self.generator_norm = generator.layers, generator.final_norm
        self.generator_head, self.table = masked.head, masked.table
        self.detector = Detector(encoder.config)

    @property
    def generator(self) -> MaskedLanguage:
        """Predicts hidden tokens with the encoder's embedding and layers of its own."""
        self._generator[0].training = self.training
        return self._generator[0]

    def read(self, data: Samples) -> None:
        """Learn from the tokenizer which ids are special and where words begin."""
        self.generator.read(data)

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """The generator's cross-entropy over hidden tokens plus the detector's over all ordinary ones, in nats.

        Metrics: `accuracy` of the generator, `detected`: tokens that the detector judges rightly, and `replaced`:
        tokens that are not the original, as shares of all.
        """
        assert isinstance(batch, TextBatch)
        settings = self.config.generator
        generator, ratio = self.generator, settings.ratio(progress)
        seen, chosen = generator.masked(batch, progress)
        hidden, targets, counted = generator.hidden_targets(seen, chosen, batch)
        weight, bias = generator.decoder_weight, generator.head.bias
        sums = token_loss(hidden, weight, bias, targets, counted, chunk=settings.chunk, z_loss=settings.z_loss)

        tokens, documents = batch.tokens[:, :-1], batch.documents[:, :-1]
        filled = self._filled(seen, chosen, hidden, batch.keys)
        replaced = filled != tokens
        judged = ~self.table.special[tokens]
        scores = self.detector(self.encoder(filled, documents if settings.document_mask else None, causal=False))
        loss = F.binary_cross_entropy_with_logits(scores.float(), replaced.float(), reduction="none")
        right = (scores > 0) == replaced
        metrics = {
            "accuracy": sums.correct,
            "detected": ratio * (right & judged).sum().float(),
            "replaced": ratio * (replaced & judged).sum().float(),
        }
        detected = ratio * torch.where(judged, loss, 0.0).sum()
        return Output(sums.loss + self.config.weight * detected, counted.sum().float(), metrics)

    @torch.no_grad()
    def _filled(self, seen: Tensor, chosen: Tensor, hidden: Tensor, keys: Tensor) -> Tensor:
        """What the encoder reads, int64 (b, n): tokens drawn from the generator in the `chosen` places.

        Each is drawn with a number of its own row's key. (A split into other microbatches rounds the generator's
        probabilities otherwise, so that a draw that falls within 1e-6 of a boundary may differ.)
        """
        places = places_of(chosen, self.config.generator.capacity(seen.shape[1]))
        lots = uniform(keys, "replaced token", (places.shape[1],))
        generator = self.generator
        drawn = sample_tokens(
            hidden,
            generator.decoder_weight,
            generator.head.bias,
            rearrange(lots, "b k -> (b k)"),
            self.config.generator.chunk,
        )
        drawn = rearrange(drawn, "(b k) -> b k", b=len(seen))
        kept = torch.where(chosen.gather(1, places), drawn, seen.gather(1, places))
        return seen.scatter(1, places, kept)


class Detector(nn.Module):
    """ELECTRA's discriminator head: dense, GELU, one score a token."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.score = nn.Linear(config.width, 1)
        initialise(self, config.depth)
        for bias in (self.dense.bias, self.score.bias):
            nn.init.zeros_(bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Log-odds (b, n) that a token was replaced, from hidden vectors (b, n, d)."""
        return rearrange(self.score(F.gelu(self.dense(hidden))), "b n 1 -> b n")
