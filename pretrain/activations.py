"""Activations that are computed again in the backward pass instead of being kept (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from data.errors import UserError


def recompute(module: nn.Module) -> None:
    """Let each repeated block keep its input alone, in place; names and losses stay as they are.

    A step then takes about a third more arithmetic. Blocks are the composite members of lists and sequences of modules,
    the outermost ones. Random numbers (stochastic depth) are drawn again as they were.

    Raises:
        UserError: there is no such block, or one has BatchNorm, whose running statistics would move twice.
    """
    blocks = list(repeated(module))
    if not blocks or any(isinstance(each, _BatchNorm) for block in blocks for each in block.modules()):
        why = "its blocks have BatchNorm" if blocks else "it has no repeated blocks"
        raise UserError(
            f"train.recompute does not go with this encoder: {why}; leave it out and lower train.microbatch"
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost composite members of lists and sequences of modules that have parameters."""
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    for child in module.children():
        composite = not isinstance(child, nn.ModuleList | nn.Sequential) and any(True for _ in child.children())
        if listed and composite and next(child.parameters(), None) is not None:
            yield child
        else:
            yield from repeated(child)
