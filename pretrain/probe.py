"""Looking at features while a run goes on: a weighted kNN classifier on frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from data.dataset import Ints
from data.keyed import hash64
from data.loader import sequential
from data.mixture import Samples
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
    encoder: nn.Module, dataset: Samples, config: VisionConfig, canvas: int, ids: Ints | None = None
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


def labelled_subset(dataset: Samples, most: int) -> Ints:
    """At most `most` labelled sample ids, spread evenly by hash, the same at every call."""
    return subset(dataset.all_ids()[dataset.labels() >= 0], most)


def subset(ids: Ints, most: int) -> Ints:
    """At most `most` of `ids`, spread evenly by hash, the same at every call, ascending."""
    order = np.argsort(hash64(_SUBSET_SEED, ids), kind="stable")
    return np.sort(ids[order[:most]])


@dataclass
class Probe:
    """Looks at an encoder's features; with several processes each extracts and scores its share."""

    encoder: nn.Module
    config: VisionConfig
    canvas: int
    accelerator: Accelerator

    def features(self, dataset: Samples, ids: Ints) -> tuple[Tensor, Tensor]:
        """Features and labels of `ids`, in their order, on every process."""
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        # All take equally many: a sharded encoder's forward pass is a common act.
        mine = np.concatenate([ids, np.repeat(ids[-1:], -len(ids) % size)])[rank::size]
        with self.accelerator.autocast():
            found, labels = features(self.encoder, dataset, self.config, self.canvas, mine)
        return self._interleaved(found)[: len(ids)], self._interleaved(labels)[: len(ids)]

    def knn_accuracy(
        self, bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], neighbours: int, temperature: float
    ) -> float:
        """Share of the queries that their neighbours in the bank vote right; each a pair of features and labels."""
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        (stored, labels), (asked, truth) = bank, (queries[0][rank::size], queries[1][rank::size])
        classes = int(max(labels.max(), queries[1].max())) + 1
        stored, hits = F.normalize(stored, dim=1), torch.zeros((), device=stored.device)
        if len(asked):
            hits += (knn_scores(stored, labels, asked, classes, neighbours, temperature).argmax(1) == truth).sum()
        return self.accelerator.reduce(hits, reduction="sum").item() / len(queries[1])

    def _interleaved(self, mine: Tensor) -> Tensor:
        """All rows of what this process has every `num_processes`-th row of, beginning with its index."""
        if self.accelerator.num_processes == 1:
            return mine
        everyone = self.accelerator.gather(mine)
        return rearrange(everyone, "(size n) ... -> (n size) ...", size=self.accelerator.num_processes)
