"""What a model says of words and pixels, laid out as others say it: classes, words and sizes brought together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor

from finetune.dense_samples import TagSamples
from finetune.model import TaskModel
from finetune.samples import Ints, Samples
from finetune.targets import Target
from finetune.targets_dense import Segmentation

NUMBERS = 2**25
"""Probabilities of pixels that a batch holds at most."""


def items_at_once(models: Sequence[TaskModel], most: int) -> int:
    """Samples a batch, `most` or as many as have `NUMBERS` probabilities of pixels."""
    targets = [model.target for model in models if isinstance(model.target, Segmentation)]
    return min([most, *(max(1, NUMBERS // (target.size**2 * target.outputs)) for target in targets)])


def mean_of(weights: Sequence[float], each: Iterable[Tensor]) -> Tensor:
    """The mean, float32, of several models' `Target.distribution`, by weights that sum to 1; they are taken one after
    the other."""
    total: Tensor | float = 0.0
    for weight, said in zip(weights, each, strict=True):
        total = said if len(weights) == 1 else total + weight * said.double()
    assert isinstance(total, Tensor)
    return total.float()


def ordered(said: Tensor, classes: list[str], wanted: list[str]) -> Tensor:
    """Entries (…, classes) in the order of the `wanted` names."""
    return said if classes == wanted else said[..., [classes.index(name) for name in wanted]]


def fitted(said: Tensor, model: TaskModel, target: Target) -> Tensor:
    """What `model` says of a batch, with the classes (and, for pixels, at the size) of `target`."""
    said = ordered(said, model.classes, target.classes)
    if not isinstance(target, Segmentation) or said.shape[1] == target.size:
        return said
    pixels = rearrange(said, "b h w c -> b c h w")
    pixels = F.interpolate(pixels, (target.size, target.size), mode="bilinear", align_corners=False, antialias=True)
    return rearrange(pixels, "b c h w -> b h w c")


def aligned(model: TaskModel, theirs: Samples, common: Samples, positions: Ints, accelerator: Accelerator) -> Tensor:
    """What a model of a dense task says of some items.

    Args:
        theirs: the items as its encoder reads them.
        common: the same items as they are judged.
        positions: of items in `common`.

    Returns:
        float32 (b, n, tags) or (b, size, size, classes) on the accelerator's device, of the places that
        `common.truth(positions)` has, over the classes of `common.target`.
    """
    if isinstance(common, TagSamples) and theirs is not common:
        assert isinstance(theirs, TagSamples)
        return _by_word(model, theirs, common, positions, accelerator)
    said = model.say(theirs.batch(positions, theirs.keys(0, 0, positions)), accelerator)
    return fitted(said, model, common.target)


def _by_word(
    model: TaskModel, theirs: TagSamples, common: TagSamples, positions: Ints, accelerator: Accelerator
) -> Tensor:
    """Tags of the same words where two tokenizers cut texts differently.

    A word that has no token for the model gets equal probabilities, which decide nothing in a mean.
    """
    spoken = _words(model, theirs, common.target, common.owners[positions], len(positions), accelerator)
    truth, tags = common.truth(positions), common.target.outputs
    said = torch.full((*truth.shape, tags), 1 / tags, device=accelerator.device)
    for row, position in enumerate(positions.tolist()):
        owner, words = int(common.owners[position]), common.words[int(common.ids[position])]
        for place in np.flatnonzero(words >= 0).tolist():
            found = spoken.get((owner, int(words[place])))
            if found is not None:
                said[row, place] = found
    return said


def _words(
    model: TaskModel, theirs: TagSamples, target: Target, owners: Ints, size: int, accelerator: Accelerator
) -> dict[tuple[int, int], Tensor]:
    """By text and number of the word in it: the probabilities (tags,) of the words of the texts `owners`."""
    found: dict[tuple[int, int], Tensor] = {}
    rows = np.flatnonzero(np.isin(theirs.owners, owners))
    for part in np.split(rows, range(size, len(rows), size)):
        said = fitted(model.say(theirs.batch(part, theirs.keys(0, 0, part)), accelerator), model, target)
        for row, position in enumerate(part.tolist()):
            words = theirs.words[int(theirs.ids[position])]
            for place in np.flatnonzero(words >= 0).tolist():
                found[int(theirs.owners[position]), int(words[place])] = said[row, place]
    return found
