"""Which parameters decay, which learn more slowly, and which are matrices to orthogonalise."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from timm.models import group_parameters
from torch import nn

NO_DECAY_NAMES = (
    "pos_embed",
    "cls_token",
    "reg_token",
    "mask_token",
    "tok_embeddings",
    "relative_position_bias_table",
)
HEADS = frozenset({"head", "decoder_head", "lm_head", "classifier", "last_layer", "prototypes", "fc"})
"""Names of modules that end in a prediction."""
INPUTS = frozenset({"patch_embed", "tok_embeddings", "embeddings"})
"""Names of modules that read pixels or ids."""
FUSED = {"Wqkv": 3, "qkv": 3, "in_proj_weight": 3, "kv": 2, "Wi": 2}
"""Matrices that are several, stacked by rows: queries, keys and values; a gated unit's two halves."""
_LAYER = re.compile(r"^layers\.(\d+)\.")


def parameter_groups(module: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups of the trainable parameters of an objective, in the order in which they are first met.

    Each has `weight_decay` (0 for vectors, embeddings and tokens), `decays` (whether it may be other than 0),
    and `lr_scale`, which whoever sets the rate multiplies in. With `layer_decay` a layer of `module.encoder`
    that lies j below the top learns `layer_decay ** j` as fast (timm's groups; heads have scale 1).
    """
    scales = layer_scales(module, layer_decay)
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for name, parameter in _trainable(module):
        decays, scale = parameter.ndim > 1 and not any(part in name for part in NO_DECAY_NAMES), scales.get(name, 1.0)
        new = {"params": [], "weight_decay": weight_decay if decays else 0.0, "decays": decays, "lr_scale": scale}
        groups.setdefault((decays, scale), new)["params"].append(parameter)
    # With one rate the decayed come first, as they always did.
    return [groups[key] for key in sorted(groups, key=lambda key: (-key[1], not key[0]))]


def muon_groups(module: nn.Module, groups: list[dict[str, Any]], adamw_scale: float) -> list[dict[str, Any]]:
    """The same groups, the hidden matrices apart: `orthogonal`, with `parts` stacked by rows, or AdamW's."""
    names = {id(parameter): name for name, parameter in _trainable(module)}
    found = []
    for group in groups:
        split: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts = matrix_parts(names[id(parameter)], parameter)
            split.setdefault(parts, []).append(parameter)
        for parts in sorted(split, reverse=True):
            scale = group["lr_scale"] * (1.0 if parts else adamw_scale)
            facts = {"params": split[parts], "orthogonal": parts > 0, "parts": parts, "lr_scale": scale}
            found.append(group | facts)
    return found


def matrix_parts(name: str, parameter: nn.Parameter) -> int:
    """How many hidden matrices a parameter stacks by rows; 0 for vectors, tables, what reads input and heads.

    A convolution counts as a matrix of (outputs, inputs * height * width), a depthwise one does not.
    """
    segments = name.split(".")
    if parameter.ndim not in (2, 4) or min(parameter.shape[:2]) < 2 or any(part in name for part in NO_DECAY_NAMES):
        return 0
    if not HEADS.isdisjoint(segments) or not INPUTS.isdisjoint(segments):
        return 0
    return next((parts for part, parts in FUSED.items() if part in segments), 1)


def layer_scales(module: nn.Module, layer_decay: float) -> dict[str, float]:
    """`lr_scale` of each parameter of `module.encoder`, by its name in `module`; empty without decay."""
    if layer_decay == 1.0:
        return {}
    encoder = module.get_submodule("encoder")
    depths = _depths(encoder)
    top = max(depths.values()) + 1
    return {f"encoder.{name}": layer_decay ** (top - depth) for name, depth in depths.items()}


def _depths(encoder: nn.Module) -> dict[str, int]:
    """Depth of each parameter by name, 0 at the input: timm's grouping, or ours for the text transformer."""
    matcher = getattr(encoder, "group_matcher", None)
    if matcher is not None:
        depths: dict[str, int] = group_parameters(encoder, matcher(coarse=False), reverse=True)
        return depths
    found = {name: _LAYER.match(name) for name, _ in encoder.named_parameters()}
    last = max((int(layer[1]) + 1 for layer in found.values() if layer), default=0)
    return {
        name: int(layer[1]) + 1 if layer else 0 if name.startswith("embeddings.") else last
        for name, layer in found.items()
    }


def _trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
