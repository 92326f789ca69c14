"""From pooled features to class probabilities: a linear layer, an MLP, or a bank of neighbours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.probe import knn_scores, rows_at_once, vote


class LinearHead(nn.Module):
    """`logits = W norm(features) + b`.

    Pooled features of a masked autoencoder differ little between samples around a large common mean, so
    `norm` standardises: `(features - mean) * scale` with constants measured once, after which a LayerNorm
    may follow. The constants are buffers: a saved head carries them.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, classes: int, layer_norm: bool = False, seed: int | None = None) -> None:
        """Zeros, or normal weights of standard deviation 0.01 where a `seed` is given."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.norm = nn.LayerNorm(features) if layer_norm else nn.Identity()
        self.linear = nn.utils.skip_init(nn.Linear, features, classes)
        nn.init.zeros_(self.linear.bias)
        nn.init.zeros_(self.linear.weight)
        if seed is not None:
            self.linear.weight.data.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))

    def standardize(self, features: Tensor) -> None:
        """Set the constants from features (n, d): each dimension gets mean 0 and standard deviation 1.

        Deviations below a hundredth of their root mean square count as that hundredth: a dimension that
        hardly varies beside the others carries rounding, not signal.
        """
        mean, scale = standardization(features)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, classes) of pooled features (b, d)."""
        logits: Tensor = self.linear(self.norm((features - self.mean) * self.scale))
        return logits

    def probabilities(self, features: Tensor) -> Tensor:
        """float32 (b, classes), rows sum to 1."""
        return self(features.float()).softmax(dim=1)


class MLPHead(nn.Module):
    """One hidden layer: `logits = W GELU(V standardised + c) + b`; see `LinearHead` for the constants."""

    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, hidden: int, classes: int, seed: int = 0) -> None:
        """He-normal first weights; the last ones normal with a standard deviation of 0.01."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.hidden = nn.utils.skip_init(nn.Linear, features, hidden)
        self.linear = nn.utils.skip_init(nn.Linear, hidden, classes)
        generator = torch.Generator().manual_seed(seed)
        self.hidden.weight.data.normal_(std=(2 / features) ** 0.5, generator=generator)
        self.linear.weight.data.normal_(std=0.01, generator=generator)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.linear.bias)

    def standardize(self, features: Tensor) -> None:
        """Set the constants from features (n, d), as `LinearHead.standardize`."""
        mean, scale = standardization(features)
        self.mean.copy_(mean)
        self.scale.copy_(scale)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (b, classes) of pooled features (b, d)."""
        logits: Tensor = self.linear(F.gelu(self.hidden((features - self.mean) * self.scale)))
        return logits

    def probabilities(self, features: Tensor) -> Tensor:
        """float32 (b, classes), rows sum to 1."""
        return self(features.float()).softmax(dim=1)


def standardization(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation (d,) of features (n, d), computed in float64."""
    wide = features.double()
    deviation = wide.std(dim=0, correction=0)
    floor = 0.01 * deviation.square().mean().sqrt()
    scale = 1.0 / deviation.clamp(min=float(floor) or 1.0)
    return wide.mean(dim=0).to(features.dtype), scale.to(features.dtype)


class NeighbourHead(nn.Module):
    """Weighted vote of the nearest labelled features (Wu et al. 2018; DINO, appendix F.1).

    Similarity is the cosine; each of the `k` nearest votes for its class with weight
    `exp(similarity / temperature)`.
    """

    bank: Tensor
    labels: Tensor

    def __init__(self, bank: Tensor, labels: Tensor, classes: int, k: int, temperature: float = 0.07) -> None:
        """`bank` float32 (n, d) features, `labels` int64 (n,); k is cut to n."""
        super().__init__()
        self.register_buffer("bank", F.normalize(bank.float(), dim=1))
        self.register_buffer("labels", labels)
        self.classes, self.k, self.temperature = classes, min(k, len(bank)), temperature

    def forward(self, features: Tensor) -> Tensor:
        """Log of the votes' shares (b, classes): logits, as the linear head's."""
        return self.probabilities(features).log()

    def probabilities(self, features: Tensor) -> Tensor:
        """float32 (b, classes), rows sum to 1."""
        return knn_scores(self.bank, self.labels, features, self.classes, self.k, self.temperature)

    def leave_one_out(self, rows: Tensor, ks: list[int]) -> list[float]:
        """For each k of `ks`, the accuracy with which the bank's `rows` are classified by all others."""
        hits = [0] * len(ks)
        for chunk in rows.split(rows_at_once(self.bank)):
            similarity = self.bank[chunk] @ self.bank.T
            similarity[torch.arange(len(chunk), device=chunk.device), chunk] = -torch.inf
            values, places = similarity.topk(min(max(ks), len(self.bank) - 1), dim=1)
            for i, k in enumerate(ks):
                votes = vote(values[:, :k], self.labels[places[:, :k]], self.classes, self.temperature)
                hits[i] += int((votes.argmax(dim=1) == self.labels[chunk]).sum())
        return [hit / len(rows) for hit in hits]
