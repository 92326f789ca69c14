"""Layer-wise learning-rate decay: the nearer to the input, the slower a layer learns."""

from __future__ import annotations

from typing import Any

from torch import nn

from finetune.encoder import Encoder
from pretrain.parameter_groups import NO_DECAY_NAMES

_DEEP_DECAY = 0.75
_DEEP = 12
"""Layers from which on the decay is `_DEEP_DECAY`."""


def default_decay(layers: int) -> float:
    """The decay for an encoder of so many layers: 1 - layers / 48, but at least 0.75.

    0.75 is what BEiT and MAE use for twelve layers and more. Shallow encoders have no low layers that are to be kept
    as they are: with 0.75 a network of four learnt SST-2 worse than from scratch.
    """
    return 1 - (1 - _DEEP_DECAY) * min(max(layers, 0), _DEEP) / _DEEP


def parameter_groups(
    encoder: Encoder, head: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """AdamW groups of encoder and head, each with an `lr_scale` that the training loop multiplies in.

    The head has scale 1, a layer `j` steps below it `layer_decay ** j` (Clark et al. 2020; Bao et al.
    2022; the same groups as timm's `param_groups_layer_decay` on a model with a classifier). Vectors,
    biases and what the encoder lists (position embeddings) are not decayed. `layer_decay` follows from the
    depth where it is not given.
    """
    depths, top = encoder.layers()
    layer_decay = default_decay(top - 1) if layer_decay is None else layer_decay
    spared = encoder.no_weight_decay()
    groups: dict[tuple[int, float], dict[str, Any]] = {}
    members = [(name, depths.get(name, top), parameter) for name, parameter in encoder.named_parameters()]
    members += [(name, top, parameter) for name, parameter in head.named_parameters()]
    for name, depth, parameter in members:
        if not parameter.requires_grad:
            continue
        spare = parameter.ndim <= 1 or name in spared or any(part in name for part in NO_DECAY_NAMES)
        decay = 0.0 if spare else weight_decay
        new = {"params": [], "names": [], "lr_scale": layer_decay ** (top - depth), "weight_decay": decay}
        new["decays"] = not spare
        group = groups.setdefault((depth, decay), new)
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[place] for place in sorted(groups)]
