"""From a recipe to the things it names: the objective, the datasets, the loader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data.dataset import ShardedDataset
from data.errors import UserError
from data.shards import MANIFEST
from pretrain.encoders.text import TextConfig
from pretrain.encoders.vision import VisionConfig
from pretrain.objectives.masked_image import MAEConfig, MaskedAutoencoder
from pretrain.objectives.next_token import NextToken, NextTokenConfig
from pretrain.objectives.protocol import Objective
from pretrain.recipe import Recipe


@dataclass
class Datasets:
    """What a run reads."""

    train: ShardedDataset
    validation: ShardedDataset | None


def build_objective(recipe: Recipe) -> Objective:
    """The objective around its encoder, initialised from the recipe's seed; the global random state is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        if isinstance(recipe.objective, MAEConfig) and isinstance(recipe.encoder, VisionConfig):
            return MaskedAutoencoder(recipe.objective, recipe.encoder)
        assert isinstance(recipe.objective, NextTokenConfig)
        assert isinstance(recipe.encoder, TextConfig)
        return NextToken(recipe.objective, recipe.encoder)


def open_data(recipe: Recipe) -> Datasets:
    """Open the recipe's shards; raises `UserError` when they do not fit the encoder."""
    if recipe.data.train is None:
        raise UserError(f"recipe {recipe.name} names no data; add data.train=FOLDER_OF_SHARDS")
    kind = "text" if isinstance(recipe.encoder, TextConfig) else "images"
    context = recipe.data.context if kind == "text" else None
    train = _open(recipe.data.train, context, kind)
    if isinstance(recipe.encoder, TextConfig):
        _check_text(train, recipe.encoder, recipe.data.context)
    validation = recipe.data.validation
    if isinstance(validation, float | int):
        train, held_out = train.split(float(validation))
        return Datasets(train, held_out)
    if validation is None and kind == "text" and (train.folder / "validation" / MANIFEST).exists():
        validation = str(train.folder / "validation")
    return Datasets(train, _open(validation, context, kind) if validation else None)


def _open(source: str, context: int | None, kind: str) -> ShardedDataset:
    dataset = ShardedDataset(source, context=context if context else _context_of(source))
    if dataset.kind != kind:
        raise UserError(f"{source} holds {dataset.kind}, but the recipe's encoder reads {kind}")
    return dataset


def _context_of(source: str) -> int | None:
    """Any context lets text shards be opened far enough to say that pictures were wanted."""
    manifest = Path(source).expanduser() / MANIFEST
    return 1 if manifest.is_file() and '"kind": "text"' in manifest.read_text()[:4096] else None


def _check_text(dataset: ShardedDataset, encoder: TextConfig, context: int) -> None:
    vocabulary = dataset.manifest["vocab_size"]
    if vocabulary > encoder.vocab_size:
        raise UserError(
            f"{dataset.folder} uses {vocabulary} token ids, more than encoder.vocab_size {encoder.vocab_size}; "
            f"set encoder.vocab_size={vocabulary}"
        )
