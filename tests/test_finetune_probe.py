"""Probes: kNN is what it says, the logistic regression learns what is there and nothing else."""

import numpy as np
import pytest
import torch
from test_finetune_kit import digits

from finetune.evidence import score
from finetune.heads import LinearHead, NeighbourHead
from finetune.probe import FALLBACK_STRENGTH, STRENGTHS, fit_linear, fit_neighbours
from finetune.splits import subset


def _digits(per_class: int, shuffled: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    images, labels = digits(shuffled)
    features = torch.from_numpy(images.reshape(len(images), -1)).float()
    known = subset(labels[:1200], per_class, seed=0)
    return features[known], torch.from_numpy(labels[known]), features[1200:], labels[1200:]


@pytest.mark.parametrize("k", [1, 7, 200])
def test_knn_is_the_brute_force_vote(k: int) -> None:
    draw = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(90, 8, generator=draw), torch.randn(40, 8, generator=draw)
    labels = torch.randint(0, 4, (90,), generator=draw)
    head = NeighbourHead(bank, labels, 4, k, temperature=0.1)
    expected = torch.zeros(40, 4)
    for i in range(40):
        similarity = torch.nn.functional.cosine_similarity(queries[i], bank, dim=1)
        for j in similarity.argsort(descending=True)[:k]:
            expected[i, labels[j]] += (similarity[j] / 0.1).exp()
    expected /= expected.sum(dim=1, keepdim=True)
    torch.testing.assert_close(head.probabilities(queries), expected, rtol=1e-4, atol=1e-5)


def test_leave_one_out_is_knn_without_the_sample_itself() -> None:
    draw = torch.Generator().manual_seed(1)
    bank, labels = torch.randn(30, 4, generator=draw), torch.arange(30) % 3
    hits = 0
    for i in range(30):
        rest = torch.arange(30) != i
        hits += int(NeighbourHead(bank[rest], labels[rest], 3, 5).probabilities(bank[i : i + 1]).argmax() == labels[i])
    head = NeighbourHead(bank, labels, 3, 5)
    assert head.leave_one_out(torch.arange(30), [1, 5])[1] == pytest.approx(hits / 30)


@pytest.mark.parametrize("fit", [fit_linear, fit_neighbours])
def test_informative_features_beat_chance_clearly(fit) -> None:
    features, labels, test, truth = _digits(10)
    head, _ = fit(features, labels, 10, 0)
    assert score(head.probabilities(test).detach().numpy(), truth).interval[0] > 0.75


@pytest.mark.parametrize("fit", [fit_linear, fit_neighbours])
def test_shuffled_labels_give_chance(fit) -> None:
    features, labels, test, truth = _digits(30, shuffled=True)
    head, _ = fit(features, labels, 10, 0)
    low, high = score(head.probabilities(test).detach().numpy(), truth).interval
    assert low < 0.1 < high


def test_logistic_regression_is_the_minimum_of_its_loss() -> None:
    features, labels, _, _ = _digits(5)
    head, chosen = fit_linear(features, labels, 10, 0, strength=0.1)
    assert chosen == {"strength": 0.1}
    inputs = ((features - head.mean) * head.scale).double()
    weight = head.linear.weight.detach().double().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(inputs @ weight.T + head.linear.bias.double(), labels, reduction="sum")
    (loss + weight.square().sum() / (2 * 0.1)).backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() < 1e-2 * weight.abs().max() / 0.1


def test_strength_is_chosen_from_training_labels_or_fixed_where_they_are_too_few() -> None:
    features, labels, _, _ = _digits(10)
    assert fit_linear(features, labels, 10, 0)[1]["strength"] in STRENGTHS
    features, labels, _, _ = _digits(1)
    assert fit_linear(features, labels, 10, 0)[1]["strength"] == FALLBACK_STRENGTH


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_standardised_features_make_the_probe_indifferent_to_scale_and_offset(scale: float) -> None:
    features, labels, test, truth = _digits(5)
    head, _ = fit_linear(features * scale, labels, 10, 0, strength=0.1)
    judged = score(head.probabilities(test * scale).detach().numpy(), truth)
    assert judged.accuracy > 0.7


def test_a_class_without_labels_and_two_classes() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2 * 2  # classes 0 and 2 of three
    features = torch.randn(40, 3, generator=draw) + labels[:, None]
    head, _ = fit_linear(features, labels, 3, 0)
    predicted = head.probabilities(features).argmax(dim=1)
    assert set(predicted.tolist()) == {0, 2}
    assert (predicted == labels).float().mean() > 0.8


def test_linear_head_starts_at_zero_or_small_by_seed() -> None:
    assert not LinearHead(4, 3).linear.weight.any()
    assert torch.equal(LinearHead(4, 3, seed=1).linear.weight, LinearHead(4, 3, seed=1).linear.weight)
    assert not torch.equal(LinearHead(4, 3, seed=1).linear.weight, LinearHead(4, 3, seed=2).linear.weight)
