"""Encoders of pictures: timm models, and raw pixels as a control."""

from __future__ import annotations

import json
import logging
from itertools import chain
from pathlib import Path
from typing import Any, Self

import timm
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from data.batch import ImageBatch
from data.errors import UserError
from finetune.encoder import Augmentation, Encoder
from pretrain.encoders.vision import VisionConfig, build_vision
from pretrain.views import (
    Interpolation,
    center_boxes,
    crop_resize,
    flips,
    normalize,
    random_resized_crop_boxes,
)

_HEAD = "head_of_the_task"
"""A parameter name that matches no layer of any model, and so is sorted behind all of them."""


class ImageEncoder(Encoder):
    """A timm model without its classifier, with the preprocessing it was trained with."""

    kind = "images"
    folder: Path
    canvas: int
    """Side in pixels of the square that pictures are decoded onto."""

    def __init__(self, model: nn.Module, folder: Path, info: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.folder, self.info = model, folder, info
        # Some models (MobileNetV3, MambaOut) widen what they pool.
        width: int = getattr(model, "head_hidden_size", model.num_features)  # type: ignore[arg-type]
        self.features = int(width)
        preset: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
        self.mean: tuple[float, ...] = tuple(info.get("mean") or preset["mean"])
        self.std: tuple[float, ...] = tuple(info.get("std") or preset["std"])
        self.image_size = int(info.get("image_size") or preset["input_size"][-1])
        named = info.get("interpolation") or preset["interpolation"]
        self.interpolation: Interpolation = "bilinear" if named == "bilinear" else "bicubic"
        # Twice the size the network sees leaves crops of oblong pictures their detail.
        self.canvas = min(2 * self.image_size, int(info.get("canvas") or 2 * self.image_size))

    @classmethod
    def load(cls, folder: Path, info: dict[str, Any]) -> Self:
        """A folder in timm's layout. Raises `UserError` when the weights do not fit."""
        try:
            model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                missing = set(model.state_dict()) - set(file.keys())
        except (RuntimeError, ValueError, KeyError, TypeError, AssertionError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{folder} does not load as a timm model: {reason}") from None
        if missing:  # timm forgives missing weights where the number of classes differs
            raise UserError(
                f"{folder / 'model.safetensors'} lacks {len(missing)} of the model's weights "
                f"(such as {min(missing)}); config.json describes another model"
            )
        return cls(model, folder, info)

    def inputs(self, batch: ImageBatch, augment: Augmentation | None = None) -> tuple[Tensor, ...]:
        """Normalised float32 pictures (b, 3, image_size, image_size): centre crops, or keyed random ones."""
        if augment is None:
            boxes, flip = center_boxes(batch.sizes), None
        else:
            boxes = random_resized_crop_boxes(batch.keys, batch.sizes, augment.scale, augment.ratio)
            flip = flips(batch.keys, augment.flip) if augment.flip else None
        pixels = crop_resize(batch.images, boxes, self.image_size, flip, self.interpolation)
        return (normalize(pixels, self.mean, self.std),)

    def pool(self, *inputs: Tensor) -> Tensor:
        pooled: Tensor = self.model(*inputs)
        return pooled

    def tokens(self, *inputs: Tensor) -> Tensor:
        features: Tensor = self.model.forward_features(*inputs)  # type: ignore[operator]
        if features.ndim == 3:  # a transformer's sequence, whatever stands before its patches
            grid: tuple[int, int] = self.model.patch_embed.grid_size  # type: ignore[union-attr, assignment]
            patches = features[:, features.shape[1] - grid[0] * grid[1] :]
            return rearrange(patches, "b (h w) d -> b h w d", h=grid[0])
        if features.shape[-1] == self.token_features:
            return features
        return rearrange(features, "b d h w -> b h w d")

    @property
    def token_features(self) -> int:
        return int(self.model.num_features)  # type: ignore[arg-type]

    def layers(self) -> tuple[dict[str, int], int]:
        """timm's own grouping of the model's parameters into stem, blocks and what follows."""
        names = chain(self.model.named_parameters(), [(_HEAD, None)])
        matcher = getattr(self.model, "group_matcher", None)
        grouping = matcher(coarse=False) if matcher else {"stem": ".*"}
        depths = group_with_matcher(names, grouping, reverse=True)
        # A matcher without a stem, or one that swallows everything, still leaves the head on top.
        head = max(depths.pop(_HEAD), max(depths.values()))
        return {f"model.{name}": depth for name, depth in depths.items()}, head

    def no_weight_decay(self) -> set[str]:
        """What the timm model lists itself."""
        listed: set[str] = getattr(self.model, "no_weight_decay", set)()
        return {f"model.{name}" for name in listed}

    def untrained(self) -> ImageEncoder:
        if "recipe" in self.info:
            # As pre-training began: fixed sine-cosine positions are no merit of the pre-trained weights.
            model = build_vision(VisionConfig.model_validate(self.info["recipe"]["encoder"]))
        else:
            model = timm.create_model(f"local-dir:{self.folder}", pretrained=False, num_classes=0)
        return ImageEncoder(model.requires_grad_(True), self.folder, self.info)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads((self.folder / "config.json").read_text())
        # The classifier of a model from elsewhere is not part of the encoder.
        config["num_classes"] = 0
        config.get("pretrained_cfg", {})["num_classes"] = 0
        config.get("model_args", {}).pop("num_classes", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        weights = {name: tensor.contiguous().cpu() for name, tensor in self.model.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


logging.getLogger("timm").setLevel(logging.WARNING)
