"""How the CIFAR-10 table judges an export: kNN and a logistic regression on frozen features."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.dataset import ShardedDataset
from pretrain.encoders.vision import VisionConfig
from pretrain.probe import features, knn_scores, labelled_subset
from pretrain.recipe_file import load_recipe

DECAYS = (1e-5, 1e-4, 1e-3)
"""Weight decays of the regression to choose among, on a tenth of the training pictures."""


def judge(export: Path, shards: Path, samples: int | None = None) -> tuple[float, float]:
    """kNN (k = 200, temperature 0.1) and linear accuracy on the test pictures; `samples` of each side, or all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vision = load_recipe(export.parent / "recipe.yaml").encoder
    assert isinstance(vision, VisionConfig)
    encoder: nn.Module = timm.create_model(f"local-dir:{export}", pretrained=True).to(device)
    sides = []
    for side in ("train", "test"):
        data = ShardedDataset(shards / side)
        sides.append(features(encoder, data, vision, 32, labelled_subset(data, samples or len(data))))
    (bank, labels), (queries, truth) = sides
    classes = int(labels.max()) + 1
    votes = knn_scores(F.normalize(bank, dim=1), labels, queries, classes, neighbours=200, temperature=0.1)
    knn = (votes.argmax(1) == truth).float().mean().item()
    return round(knn, 4), round(linear_accuracy(bank, labels, queries, truth), 4)


def linear_accuracy(inputs: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> float:
    """Of a logistic regression on features (n, d), standardised, its weight decay chosen inside the training ones."""
    mean, scale = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
    inputs, queries = (inputs - mean) / scale, (queries - mean) / scale
    held_out = torch.arange(len(inputs), device=inputs.device) % 10 == 0
    found = [
        _accuracy(fit(inputs[~held_out], labels[~held_out], decay), inputs[held_out], labels[held_out])
        for decay in DECAYS
    ]
    best = DECAYS[max(range(len(DECAYS)), key=found.__getitem__)]
    return _accuracy(fit(inputs, labels, best), queries, truth)


def fit(inputs: Tensor, labels: Tensor, decay: float) -> nn.Linear:
    """Mean cross-entropy plus `decay` / 2 times the squared weights, by L-BFGS on all samples at once."""
    linear = nn.Linear(inputs.shape[1], int(labels.max()) + 1, device=inputs.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(inputs), labels) + decay / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return linear


def _accuracy(linear: nn.Linear, inputs: Tensor, labels: Tensor) -> float:
    return (linear(inputs).argmax(1) == labels).float().mean().item()
