"""Encoders without learned weights: what any pre-training has to beat."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from einops import rearrange
from torch import Tensor

from data.batch import ImageBatch, TextBatch
from data.errors import UserError
from finetune.encoder import Augmentation, Encoder
from finetune.image_encoder import ImageEncoder
from finetune.text_encoder import DocumentEncoder
from pretrain.views import center_boxes, crop_resize, normalize


class Control(Encoder):
    """Features by a fixed rule: nothing to train, to start afresh or to save."""

    def layers(self) -> tuple[dict[str, int], int]:
        return {}, 0

    def untrained(self) -> Self:
        raise UserError("a control has no weights to start afresh")

    def save(self, folder: Path) -> None:
        raise UserError("a control has no weights and cannot be saved as a model")


class RawPixels(Control):
    """The preprocessed picture itself, as one long vector."""

    kind = "images"

    def __init__(self, like: ImageEncoder, size: int | None = None) -> None:
        """The pictures that `like` sees, resized to `size` pixels a side (its own size by default)."""
        super().__init__()
        self.image_size, self.like = size or like.image_size, (like.mean, like.std, like.interpolation)
        self.canvas = like.canvas
        self.features, self.info, self.folder = 3 * self.image_size**2, {"objective": "raw pixels"}, None

    def inputs(self, batch: ImageBatch, augment: Augmentation | None = None) -> tuple[Tensor, ...]:
        mean, std, interpolation = self.like
        boxes = center_boxes(batch.sizes)
        return (normalize(crop_resize(batch.images, boxes, self.image_size, None, interpolation), mean, std),)

    def pool(self, *inputs: Tensor) -> Tensor:
        return rearrange(inputs[0], "b c h w -> b (c h w)")


class BagOfTokens(Control):
    """How often each token id occurs in a text, as log(1 + count)."""

    kind = "text"

    def __init__(self, like: DocumentEncoder) -> None:
        """Reads the rows that `like` reads."""
        super().__init__()
        self.features = like.model.config.vocab_size
        self.info, self.folder = {"objective": "bag of tokens"}, None

    def inputs(self, batch: TextBatch, augment: Augmentation | None = None) -> tuple[Tensor, ...]:
        return batch.tokens, batch.documents

    def pool(self, *inputs: Tensor) -> Tensor:
        tokens, documents = inputs
        counts = torch.zeros(len(tokens), self.features, device=tokens.device)
        return counts.scatter_add_(1, tokens, (documents == 0).float()).log1p()
