"""A model between two others: weighted averages of weights, of which soups and interpolation are made."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from data.errors import UserError
from data.keyed import hash64
from finetune.encoder import Encoder
from finetune.features import accelerator_for
from finetune.heads import LinearHead, MLPHead, NeighbourHead
from finetune.model import TaskModel
from finetune.samples import Samples
from finetune.settings import Settings
from finetune.targets_vector import Regression

STATISTICS = 4096
"""Samples over which BatchNorm's statistics are measured anew at most."""
NAMED = {"multi-label": "labels", "regression": "quantities", "tokens": "tags"}
"""How people call what a target's `classes` name, where it is no class."""
_ORDER = 0xB17C


def check_alike(first: TaskModel, other: TaskModel, names: tuple[str, str]) -> None:
    """Refuse models whose weights cannot be averaged; `names` stand in the error.

    Raises:
        UserError: another kind of head, other classes, another architecture or preprocessing, or training that
            began at other weights (their average would be no model of either: Neyshabur et al. 2020).
    """
    one, two = names
    for model, name in ((first, one), (other, two)):
        if isinstance(model.head, NeighbourHead):
            raise UserError(f"{name} votes by neighbours and has no weights to average; use `headwater ensemble`")
        if isinstance(model.head, MLPHead):
            raise UserError(
                f"the head of {name} has a hidden layer, whose units have no common order, so it cannot be averaged; "
                "use `headwater ensemble`"
            )
    check_classes(first, other, names)
    shapes = [{n: tuple(t.shape) for n, t in m.encoder.state_dict().items()} for m in (first, other)]
    if _view(first.encoder) != _view(other.encoder) or shapes[0] != shapes[1]:
        raise UserError(
            f"the encoders of {one} and {two} are built or fed differently, so their weights cannot be averaged; "
            "use `headwater ensemble`"
        )
    if start_of(first) != start_of(other):
        raise UserError(
            f"{one} and {two} were trained from other initial weights, so the average of theirs means nothing; "
            "use `headwater ensemble`"
        )
    heads = first.head, other.head
    assert isinstance(heads[0], LinearHead)
    assert isinstance(heads[1], LinearHead)
    if any(isinstance(head, LinearHead) and isinstance(head.norm, nn.LayerNorm) for head in heads):
        same = all(torch.equal(heads[0].state_dict()[n], heads[1].state_dict()[n]) for n in ("mean", "scale"))
        if type(heads[0].norm) is not type(heads[1].norm) or not same:
            raise UserError(f"the heads of {one} and {two} normalise differently, so they cannot be averaged")


def check_classes(first: TaskModel, other: TaskModel, names: tuple[str, str]) -> None:
    """Raises `UserError` unless both predict the same classes, in whatever order."""
    if sorted(first.classes) != sorted(other.classes):
        differing = sorted(set(first.classes) ^ set(other.classes))
        shown = ", ".join(repr(name) for name in differing[:5]) + " …" * (len(differing) > 5)
        what = NAMED.get(first.target.name, "classes")
        raise UserError(f"{names[0]} and {names[1]} predict other {what} ({shown}); only the same can be combined")


def start_of(model: TaskModel) -> tuple[object, object]:
    """What identifies the weights that training began from: the encoder's fingerprint, and the seed from scratch."""
    described = model.about.get("encoder") or {}
    scratch = model.about.get("strategy") == "scratch"
    return described.get("fingerprint"), model.about.get("seed") if scratch else None


def blend(first: TaskModel, other: TaskModel, share: float) -> TaskModel:
    """The model whose weights are `(1 - share) * first + share * other`.

    `other`'s classes are brought into `first`'s order by name, and its head is written for `first`'s
    standardisation of features (and of quantities), which changes nothing in what it computes. At 0 and 1 the model
    is `first` and `other` exactly, and two equal models give the same model. Both must have passed `check_alike`.
    """
    head, order = other.head, [other.classes.index(name) for name in first.classes]
    assert isinstance(head, LinearHead)
    assert isinstance(first.head, LinearHead)
    mixed = copy.deepcopy(first)
    mixed.temperature = (1 - share) * first.temperature + share * other.temperature
    # Adapters describe one training; averaged weights came of several.
    mixed.adapter = first.adapter if share == 0 else other.adapter if share == 1 else None
    _mix(mixed.encoder, other.encoder.state_dict(), share)
    ordered = copy.deepcopy(head).to(first.head.mean.device)
    for parameter in (ordered.linear.weight, ordered.linear.bias):
        parameter.data = parameter.data[order]
    if isinstance(first.target, Regression) and isinstance(other.target, Regression):
        theirs = other.target.select(order)
        mixed.target = theirs if share == 1 else first.target
        if share != 1:
            _write_in_units(ordered, theirs, first.target)
    if share == 1:
        mixed.head = ordered
    elif share != 0:
        _mix(mixed.head, _written_for(ordered, first.head).state_dict(), share)
    return mixed


def has_batch_norm(encoder: Encoder) -> bool:
    """Whether a part of the encoder normalises with statistics of its training batches."""
    return any(isinstance(module, _BatchNorm) for module in encoder.modules())


@torch.no_grad()
def measure_batch_norm(encoder: Encoder, samples: Samples, settings: Settings) -> None:
    """Measure the statistics of every BatchNorm anew: averaged weights give other activations than either model's.

    They are the plain means over at most `STATISTICS` samples, without augmentation (Izmailov et al. 2018, "Averaging
    weights leads to wider optima and better generalization", section 3.2).
    """
    accelerator = accelerator_for(settings)
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    encoder.to(accelerator.device).eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
        norm.train()
    # Mixed: batches of one class each would vary too little.
    order = np.argsort(hash64(_ORDER, np.arange(len(samples))), kind="stable")[:STATISTICS].astype(np.int64)
    for _, batch in samples.select(order).batches(settings.inference_batch):
        if len(batch) > 1:
            encoder(batch.to(accelerator.device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    encoder.eval()


def _view(encoder: Encoder) -> tuple[object, ...]:
    """How an encoder sees its input, apart from its weights."""
    names = ("kind", "features", "image_size", "mean", "std", "interpolation", "pooling", "context")
    facts = tuple(vars(encoder).get(name) for name in names)
    vocabulary = vars(encoder).get("tokenizer")
    return *facts, None if vocabulary is None else vocabulary.to_str()


def _mix(module: nn.Module, other: dict[str, Tensor], share: float) -> None:
    """Move a module's floating-point state by `share` of the way to `other`'s, summed in float64."""
    state = module.state_dict()
    for name, tensor in state.items():
        there = other[name].to(tensor.device)
        if share == 1:
            tensor.copy_(there)
        elif tensor.is_floating_point() and share != 0:
            tensor.copy_(tensor.double() + share * (there.double() - tensor.double()))


def _written_for(head: LinearHead, reference: LinearHead) -> LinearHead:
    """The same function of the features with the `mean` and `scale` of `reference`."""
    if torch.equal(head.mean, reference.mean) and torch.equal(head.scale, reference.scale):
        return head
    moved = copy.deepcopy(head)
    weight, scale = head.linear.weight.data.double(), head.scale.double()
    direct = weight * scale
    moved.linear.weight.data = (direct / reference.scale.double()).to(head.linear.weight.dtype)
    shift = direct @ (reference.mean.double() - head.mean.double())
    moved.linear.bias.data = (head.linear.bias.data.double() + shift).to(head.linear.bias.dtype)
    moved.mean.copy_(reference.mean)
    moved.scale.copy_(reference.scale)
    return moved


@torch.no_grad()
def _write_in_units(head: LinearHead, target: Regression, wanted: Regression) -> None:
    """Let outputs that are standardised as `target` says be standardised as `wanted`, for the same quantities."""
    if (target.mean, target.scale) == (wanted.mean, wanted.scale):
        return
    weight, bias = head.linear.weight.data, head.linear.bias.data
    mean, scale = (weight.new_tensor(each, dtype=torch.float64) for each in (target.mean, target.scale))
    to_mean, to_scale = (weight.new_tensor(each, dtype=torch.float64) for each in (wanted.mean, wanted.scale))
    weight.copy_(weight.double() * (scale / to_scale)[:, None])
    bias.copy_((bias.double() * scale + mean - to_mean) / to_scale)
