"""From hidden vectors to token losses, a few rows of logits at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pretrain.encoders.text import TextConfig, initialise, norm


class PredictionHead(nn.Module):
    """ModernBERT's head before the tied decoder: dense without bias, GELU, norm; and the decoder's bias."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width, bias=False)
        self.norm = norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        """Bias of the decoder, whose weight is the embedding's."""
        initialise(self, config.depth)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(hidden)))


class TokenLoss(NamedTuple):
    """Sums over the counted targets, float32 scalars."""

    loss: Tensor
    """Cross-entropy in nats, plus the z-loss."""
    correct: Tensor
    """Targets that have the highest logit; without gradient."""
    z_loss: Tensor
    """The share of `loss` that is z-loss; without gradient."""


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    counted: Tensor,
    *,
    chunk: int,
    z_loss: float = 0.0,
) -> TokenLoss:
    """Cross-entropy of `hidden @ weight.T + bias` against `targets`, holding at most `chunk` rows of logits.

    Gradients are computed along with the loss, so that no logits are kept or made twice. Matrix products run
    in autocast's type where that is on; everything else in float32.

    Args:
        hidden: (r, d), weight: (v, d), bias: (v,): any float type.
        targets: int64 (r,); counted: bool (r,), the rows that count.
        z_loss: weight of the squared log-normaliser (PaLM, section 5).
    """
    device = hidden.device.type
    product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    grad = torch.is_grad_enabled()
    loss, correct, z = _TokenLoss.apply(hidden, weight, bias, targets, counted, chunk, z_loss, product, grad)
    return TokenLoss(loss, correct, z)


@torch.no_grad()
def token_nats(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Cross-entropy of each row in nats, float32 (r,); for evaluation. Shapes as in `token_loss`."""
    pieces = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([F.cross_entropy(F.linear(h, weight, bias).float(), t, reduction="none") for h, t in pieces])


@torch.no_grad()
def sample_tokens(hidden: Tensor, weight: Tensor, bias: Tensor, lots: Tensor, chunk: int) -> Tensor:
    """One id a row, int64 (r,), drawn with the softmax's probabilities by numbers `lots` (r,) in [0, 1).

    Other shapes as in `token_loss`.
    """
    found = []
    for h, lot in zip(hidden.split(chunk), lots.split(chunk), strict=True):
        reached = F.linear(h, weight, bias).float().softmax(dim=-1).cumsum(dim=-1)
        place = torch.searchsorted(reached, lot[:, None] * reached[:, -1:], right=True)[:, 0]
        found.append(place.clamp(max=len(bias) - 1))
    return torch.cat(found)


class _TokenLoss(torch.autograd.Function):
    """Forward computes loss and, where asked, the gradients; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        counted: Tensor,
        chunk: int,
        z_loss: float,
        product: torch.dtype,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
        compact = weight.to(product)
        if with_grad:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight, dtype=torch.float32)
            grad_bias = torch.zeros_like(bias, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                part, target, count = (
                    hidden[rows].to(product),
                    targets[rows, None],
                    counted[rows, None].float(),
                )
                logits = torch.mm(part, compact.T).float().add_(bias.float())
                top = logits.amax(dim=1, keepdim=True)
                chosen = logits.gather(1, target)
                shares = logits.sub_(top).exp_()
                total = shares.sum(dim=1, keepdim=True)
                log_total = total.log() + top
                squares = z_loss * log_total.square()
                sums[0] += ((log_total - chosen + squares) * count).sum()
                sums[1] += ((chosen == top) * count).sum()
                sums[2] += (squares * count).sum()
                if not with_grad:
                    continue
                # d loss / d logits = softmax * (1 + 2 z log Z) - onehot, for the rows that count.
                slope = shares.mul_(count * (1 + 2 * z_loss * log_total) / total)
                slope.scatter_add_(1, target, -count)
                grad_bias += slope.sum(dim=0)
                slope = slope.to(product)
                grad_hidden[rows] = torch.mm(slope, compact)
                if product == torch.float32:
                    grad_weight.addmm_(slope.T, part)
                else:
                    grad_weight += torch.mm(slope.T, part)
        if with_grad:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype))
        loss, correct, z = (part.clone() for part in sums)
        ctx.mark_non_differentiable(correct, z)
        return loss, correct, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        return hidden * grad, weight * grad, bias * grad, None, None, None, None, None, None
