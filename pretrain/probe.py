"""Looking at features while a run goes on: a weighted kNN classifier on frozen features."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.dataset import Ints, ShardedDataset
from data.keyed import hash64
from data.loader import sequential
from pretrain.encoders.vision import VisionConfig, eval_view

_CHUNK = 1024
_SUBSET_SEED = 0xBA27


def knn_scores(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    classes: int,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Votes of the nearest bank features by cosine, weighted by exp(similarity / temperature).

    Wu et al. 2018, section 3.4; DINO's settings. Works through the queries in chunks and adds votes up
    in place, so memory is chunk x bank, never chunk x neighbours x classes.

    Args:
        bank: float (n, d) features with int64 `labels` (n,).
        queries: float (m, d).

    Returns:
        float32 (m, classes), rows sum to one.
    """
    bank = F.normalize(bank.float(), dim=1)
    scores = torch.zeros(len(queries), classes, device=queries.device)
    for start in range(0, len(queries), _CHUNK):
        chunk = F.normalize(queries[start : start + _CHUNK].float(), dim=1)
        similarity, nearest = (chunk @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        scores[start : start + _CHUNK].scatter_add_(1, labels[nearest], votes)
    return scores / scores.sum(dim=1, keepdim=True)


@torch.no_grad()
def features(
    encoder: nn.Module, dataset: ShardedDataset, config: VisionConfig, canvas: int, ids: Ints | None = None
) -> tuple[Tensor, Tensor]:
    """Pooled features float32 (n, d) and labels int64 (n,) of the samples `ids`, on the encoder's device."""
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    parts, labels = [], []
    for batch in sequential(dataset, 256, canvas=canvas, ids=ids):
        batch = batch.to(device)
        parts.append(encoder(eval_view(batch, config)).float())
        labels.append(batch.labels)
    encoder.train(training)
    return torch.cat(parts), torch.cat(labels)


def labelled_subset(dataset: ShardedDataset, most: int) -> Ints:
    """At most `most` labelled sample ids, spread evenly by hash, the same at every call."""
    ids = dataset.all_ids()[dataset.labels() >= 0]
    order = np.argsort(hash64(_SUBSET_SEED, ids), kind="stable")
    return np.sort(ids[order[:most]])


def online_knn(
    encoder: nn.Module,
    train: ShardedDataset,
    validation: ShardedDataset,
    config: VisionConfig,
    canvas: int,
    bank_samples: int,
    query_samples: int,
    neighbours: int,
) -> float | None:
    """Accuracy of kNN on held-out pictures, or None where too few are labelled."""
    bank_ids = labelled_subset(train, bank_samples)
    query_ids = labelled_subset(validation, query_samples)
    if not len(bank_ids) or not len(query_ids):
        return None
    bank, labels = features(encoder, train, config, canvas, bank_ids)
    queries, truth = features(encoder, validation, config, canvas, query_ids)
    classes = int(max(labels.max(), truth.max())) + 1
    guesses = knn_scores(bank, labels, queries, classes, neighbours).argmax(dim=1)
    return (guesses == truth).float().mean().item()
