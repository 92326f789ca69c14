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

    Wu et al. 2018, section 3.4; DINO's settings. Works through the queries in chunks, so memory is
    chunk x bank.

    Args:
        bank: float (n, d) features, each of length one, with int64 `labels` (n,).
        queries: float (m, d).

    Returns:
        float32 (m, classes), rows sum to one.
    """
    scores = []
    for chunk in queries.split(rows_at_once(bank)):
        similarity, nearest = (F.normalize(chunk.float(), dim=1) @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        scores.append(vote(similarity, labels[nearest], classes, temperature))
    return torch.cat(scores)


def vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float = 0.07) -> Tensor:
    """Shares of the classes among neighbours: (m, classes) from similarities and labels (m, k).

    A neighbour's weight is exp(similarity / temperature); they are added up in place, never spread over
    m x k x classes.
    """
    votes = similarity.new_zeros(len(similarity), classes)
    return votes.scatter_add_(1, labels, (similarity / temperature).softmax(dim=1))


def rows_at_once(bank: Tensor) -> int:
    """Queries whose similarities to the whole `bank` (n, d) take about 64 MiB."""
    return max(1, 2**24 // len(bank))


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
    guesses = knn_scores(F.normalize(bank, dim=1), labels, queries, classes, neighbours).argmax(dim=1)
    return (guesses == truth).float().mean().item()
