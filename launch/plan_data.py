"""What a plan knows of the data: from the shards where there are any, else assumed, and said so."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from data.errors import UserError
from data.mixture import Samples
from launch.plan_devices import SETS, Loading, assumed_loading
from launch.plan_rates import fastest
from pretrain.build import open_data, resolve
from pretrain.encoders.text import TextConfig
from pretrain.objectives.supervised import SupervisedConfig
from pretrain.recipe import Recipe

_VOCABULARY = 8192
_CLASSES = 1000
_DECODED = 64
"""Pictures whose decoding is timed."""


@dataclass(frozen=True)
class Source:
    """The training set."""

    samples: int
    loading: Loading
    about: str
    """Where the number of samples comes from."""


def look_at(recipe: Recipe, samples: int | None) -> tuple[Recipe, Source]:
    """The recipe with nothing left open, and its data; raises `UserError` where their number is unknown."""
    if recipe.data.train is not None:
        data = open_data(recipe)
        count = samples or len(data.train)
        about = "as asked" if samples else f"of {data.train.folder}"
        return resolve(recipe, data), Source(count, _seen(recipe, data.train), about)
    named = next((size for name, size in SETS.items() if name in recipe.name), None)
    if samples is None and named is None and recipe.train.epochs is not None:
        raise UserError(
            f"recipe {recipe.name} counts epochs; say of how many samples: --samples N, or data.train=SHARDS"
        )
    kind, side = recipe.encoder.kind, recipe.data.canvas
    if isinstance(recipe.encoder, TextConfig):
        side = recipe.encoder.context + 1
        vocabulary = recipe.encoder.vocab_size or _VOCABULARY
        recipe = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"vocab_size": vocabulary})})
    if isinstance(recipe.objective, SupervisedConfig):
        classes = recipe.objective.classes or _CLASSES
        recipe = recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"classes": classes})})
    count = samples or named or recipe.train.batch_size * (recipe.train.steps or 1)
    about = "as asked" if samples else "of the set it is named after" if named else "each seen once"
    return recipe, Source(count, assumed_loading(kind, side), about)


def _seen(recipe: Recipe, data: Samples) -> Loading:
    """Bytes from the manifest; the rate of decoding from a few of the pictures themselves."""
    stored = sum(int(shard["bytes"]) for shard in data.manifest["shards"])
    each = stored / max(1, sum(int(shard["samples"]) for shard in data.manifest["shards"]))
    if isinstance(recipe.encoder, TextConfig):
        return Loading(float("inf"), 2.0 * (recipe.encoder.context + 1), "two bytes a token, nothing to decode")
    from data.canvas import decode

    ids = data.all_ids()[:_DECODED]
    payloads = itertools.cycle(data.pictures(ids)[0])
    seconds = fastest(lambda: [decode(next(payloads), recipe.data.canvas) for _ in range(len(ids))], 0.3)
    return Loading(len(ids) / seconds, each, f"decoding of {len(ids)} of its pictures, timed here in one thread")
