"""From a recipe to the things it names: the objective, the datasets, the loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from data.errors import UserError
from data.mixture import Samples, open_samples
from data.shards import MANIFEST
from pretrain.encoders.text import TextConfig, TextEncoder
from pretrain.encoders.vision import VisionConfig, build_vision
from pretrain.objectives.pictures import PICTURES
from pretrain.objectives.protocol import Objective
from pretrain.objectives.supervised import SupervisedConfig, resolve_classes
from pretrain.objectives.texts import TEXTS
from pretrain.recipe import Recipe


@dataclass
class Datasets:
    """What a run reads."""

    train: Samples
    validation: Samples | None
    watched: dict[str, Samples] = field(default_factory=dict)
    """Further held-out samples, by name."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint must agree with to be resumed: which samples there are, not where they lie."""
        return {"samples": len(self.train), "fingerprint": self.train.fingerprint[:16]}


_OBJECTIVES: dict[type, Callable[[Any, Any, Any], Objective]] = {
    **PICTURES,
    **TEXTS,
}
"""By the type of a recipe's `objective`: called with it, the recipe's `encoder`, and the encoder built from that."""


def build_objective(recipe: Recipe) -> Objective:
    """The objective around its encoder, initialised from the recipe's seed; the global random state is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        encoder = build_encoder(recipe.encoder)
        return _OBJECTIVES[type(recipe.objective)](recipe.objective, recipe.encoder, encoder)


def build_encoder(config: VisionConfig | TextConfig) -> nn.Module:
    """A new encoder, its weights drawn from torch's global generator."""
    return build_vision(config) if isinstance(config, VisionConfig) else TextEncoder(config)


def open_data(recipe: Recipe) -> Datasets:
    """Open the recipe's shards; raises `UserError` when they do not fit the encoder."""
    if recipe.data.train is None:
        raise UserError(f"recipe {recipe.name} names no data; add data.train=FOLDER_OF_SHARDS")
    context = recipe.encoder.context if isinstance(recipe.encoder, TextConfig) else None
    kind, damaged = "text" if context else "images", recipe.data.damaged

    def opened(source: str | list[str] | dict[str, float]) -> Samples:
        return open_samples(source, context=context, kind=kind, tolerance=damaged)

    train, validation = opened(recipe.data.train), recipe.data.validation
    watched = {name: opened(source) for name, source in recipe.data.watched.items()}
    if isinstance(validation, float | int):
        kept, held_out = train.split(float(validation))
        return Datasets(kept, held_out, watched)
    if validation is not None:
        return Datasets(train, opened(validation), watched)
    own = [str(folder / "validation") for folder in train.folders if (folder / "validation" / MANIFEST).exists()]
    return Datasets(train, opened(dict.fromkeys(own, 1.0)) if own and context else None, watched)


def resolve(recipe: Recipe, data: Datasets) -> Recipe:
    """The recipe with what only the data can tell, where it was left open: the size of the vocabulary, the classes.

    Raises:
        UserError: the tokenizer of the data has more ids than the encoder has embeddings; labels are wanted, and
            there are none or too many.
    """
    if isinstance(recipe.objective, SupervisedConfig):
        labels, train = data.train.labels(), data.train
        found = resolve_classes(recipe.objective, len(train.classes or ()), int(labels.max()), str(train.folder))
        return recipe.model_copy(update={"objective": found})
    if not isinstance(recipe.encoder, TextConfig):
        return recipe
    known, given = data.train.manifest["vocab_size"], recipe.encoder.vocab_size
    if given and given < known:
        raise UserError(
            f"{data.train.folder} uses {known} token ids, more than encoder.vocab_size={given}; "
            f"set encoder.vocab_size={known} or leave it out"
        )
    facts = {"vocab_size": given or known, "pad_token": data.train.manifest["pad"]}
    return recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update=facts)})
