"""Stochastic depth (Huang et al. 2016): residual branches left out at random, the deeper the more often."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from data.errors import UserError
from data.keyed import uniform
from finetune.encoder import Encoder
from pretrain.encoders.text import Layer

_ENDS = ("drop_path", "drop_path1", "drop_path2")
"""Where timm's residual branches end."""


class StochasticDepth:
    """Leaves branches of an encoder out while it trains, for each sample by its key; nothing of it is saved.

    Because the draws come from the samples' keys they are the same for any split of the batch over processes.
    """

    def __init__(self, encoder: Encoder, rate: float) -> None:
        """The first block keeps all, the last leaves out a share `rate`, those between them lie on a line.

        Raises `UserError` where the encoder has no residual branch that is known here.
        """
        blocks = list(_blocks(encoder))
        if not blocks:
            raise UserError(f"{type(encoder).__name__} has no residual branches known to drop_path; leave it out")
        self.encoder = encoder
        encoder.one_a_row = True
        for module in encoder.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0  # what pre-training set; it would draw from the process-wide state
        self.keep: list[float] = []
        self.kept = torch.empty(0)
        """Whether each sample goes through each branch, bool (b, branches); for the forward pass at hand."""
        self._handles: list[RemovableHandle] = []
        for number, ends in enumerate(blocks):
            for end in ends:
                self._handles.append(end.register_forward_hook(self._hook(len(self.keep))))
                self.keep.append(1.0 - rate * number / max(1, len(blocks) - 1))

    def draw(self, keys: Tensor) -> None:
        """Decide for the samples of `keys` (b,), int64, which come next."""
        drawn = uniform(keys, "drop path", (len(self.keep),))
        self.kept = drawn < torch.tensor(self.keep, device=drawn.device)

    def remove(self) -> None:
        """Leave the encoder as it was."""
        self.encoder.one_a_row = False
        for handle in self._handles:
            handle.remove()

    def _hook(self, branch: int) -> Any:
        def scale(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            if not module.training:
                return output
            kept = self.kept[:, branch].to(output.dtype) / self.keep[branch]
            return output * kept.view(-1, *[1] * (output.ndim - 1))

        return scale


def _blocks(encoder: nn.Module) -> Iterator[list[nn.Module]]:
    """The modules that each block's residual branches end in, from the input up."""
    for module in encoder.modules():
        names = ("attn", "mlp") if isinstance(module, Layer) else _ENDS
        ends = [child for name, child in module.named_children() if name in names]
        if ends:
            yield ends
