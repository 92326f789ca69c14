"""A linear head as the head of transformers' ModernBERT classifiers: dense, activation, layer norm, classifier."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from data.errors import UserError
from finetune.export_source import Exported
from finetune.heads import LinearHead


class ClassifierHead(NamedTuple):
    """The tensors of their head, float32; its activation is the identity (`linear`)."""

    dense_weight: Tensor
    dense_bias: Tensor
    norm_weight: Tensor
    classifier_weight: Tensor
    classifier_bias: Tensor


_MARGIN = 1024.0
"""How much larger the constants are than any signal; its inverse square bounds the relative error."""


def classifier_head(exported: Exported, norm_weight: Tensor, eps: float) -> ClassifierHead:
    """Their head with our head's logits.

    Theirs has a layer norm, ours is linear. The norm is made linear: `dense` writes the logits' signal `s`, its
    negative, and constants `+c` and `-c` (through its bias). The mean is then zero and the variance that of the
    constants, up to |s|^2 / c^2 < 1e-6, so the norm multiplies by a known number, which `classifier` takes back;
    it reads (s - (-s)) / 2, in which rounding errors of the mean cancel.

    Our head with a layer norm of its own needs no such device: standardisation goes into `dense`.

    Args:
        norm_weight: (d,) of the encoder's last norm: with it the length of a pooled vector is bounded.
        eps: their norms' epsilon.

    Raises:
        UserError: a neighbours' head, or more outputs than their head can carry.
    """
    head = exported.head
    if isinstance(head, LinearHead) and isinstance(head.norm, torch.nn.LayerNorm):
        return _normed(exported, head, eps)
    weight, bias = exported.linear()
    count, width = weight.shape
    free = width - 2 * count
    if free < 2:
        raise UserError(
            f"{count} outputs do not fit into the head of transformers' ModernBERT, which at a width of {width} "
            f"carries {(width - 2) // 2} exactly; export the model as onnx or torch"
        )
    # A token's vector is a norm's output: at most sqrt(d) long before the norm's weights; so is a mean of them.
    largest = float(torch.linalg.matrix_norm(weight * norm_weight.double(), ord=2)) * math.sqrt(width)
    pairs = free // 2
    constant = 2.0 ** math.ceil(math.log2(max(_MARGIN * largest / math.sqrt(pairs), 1.0)))
    dense = torch.zeros(width, width, dtype=torch.float64)
    dense[:count], dense[count : 2 * count] = weight, -weight
    shift = torch.zeros(width, dtype=torch.float64)
    shift[2 * count : 2 * count + 2 * pairs] = constant * torch.tensor([1.0, -1.0]).repeat(pairs)
    gain = math.sqrt(2 * pairs * constant**2 / width + eps)
    back = torch.zeros(count, width, dtype=torch.float64)
    back[:, :count] = 0.5 * gain * torch.eye(count, dtype=torch.float64)
    back[:, count : 2 * count] = -back[:, :count]
    return _single(dense, shift, torch.ones(width), back, bias)


def _normed(exported: Exported, head: LinearHead, eps: float) -> ClassifierHead:
    norm = head.norm
    assert isinstance(norm, torch.nn.LayerNorm)
    # A norm's epsilon is relative to what enters it.
    stretch = math.sqrt(eps / norm.eps)
    scale = stretch * head.scale.double()
    weight, bias = exported.fold(head.linear.weight.detach().double(), head.linear.bias.detach().double())
    bias = bias + weight @ norm.bias.detach().double()
    return _single(torch.diag(scale), -scale * head.mean.double(), norm.weight.detach(), weight, bias)


def _single(*tensors: Tensor) -> ClassifierHead:
    return ClassifierHead(*(tensor.float().contiguous() for tensor in tensors))
