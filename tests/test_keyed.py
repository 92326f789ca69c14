"""Laws of keyed random numbers: the published bits, no dependence on the batch, uniform, unrelated streams."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from data.keyed import bits, hash64, hash_texts, permutation, philox, sample_keys, uniform

FULL = 0xFFFFFFFF
KEYS = torch.from_numpy(sample_keys(3, 1, np.arange(4000)))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_bits(counter, key, expected) -> None:
    # Random123, examples/kat_vectors: philox4x32 with 10 rounds.
    words = philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(word) for word in words) == expected


def test_philox_broadcasts_without_mixing_lanes() -> None:
    counters = torch.tensor([0, 7, FULL])
    keys = torch.tensor([[0], [FULL]])
    zero = torch.tensor(0)
    together = torch.stack(philox((counters, zero, zero, zero), (keys, zero)))
    for row, key in enumerate(keys[:, 0]):
        for column, counter in enumerate(counters):
            alone = torch.stack(philox((counter, zero, zero, zero), (key, zero)))
            assert torch.equal(together[:, row, column], alone)


@given(
    keys=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=0, max_size=12),
    cut=st.integers(0, 12),
    shape=st.sampled_from([(), (1,), (3,), (2, 5), (0,)]),
    stream=st.sampled_from(["crop", "flip", "mask"]),
)
def test_any_split_of_the_batch_gives_the_same_bits(keys, cut, shape, stream) -> None:
    tensor = torch.tensor(keys, dtype=torch.int64)
    whole = uniform(tensor, stream, shape)
    assert whole.shape == (len(keys), *shape)
    assert torch.equal(whole, torch.cat([uniform(tensor[:cut], stream, shape), uniform(tensor[cut:], stream, shape)]))


def test_asking_for_more_numbers_keeps_the_first_ones() -> None:
    assert torch.equal(bits(KEYS[:50], "mask", 23)[:, :5], bits(KEYS[:50], "mask", 5))


def test_streams_and_keys_decide_the_bits() -> None:
    assert not torch.equal(bits(KEYS, "crop", 1), bits(KEYS, "flip", 1))
    assert len(torch.unique(bits(KEYS, "crop", 4), dim=0)) == len(KEYS)
    # Both halves of the key count.
    low_and_high = torch.tensor([5, 5 + (1 << 32), 6])
    assert len(torch.unique(bits(low_and_high, "crop", 4), dim=0)) == 3


@pytest.mark.parametrize("stream", ["crop", "flip", "mask"])
def test_numbers_are_uniform_over_keys_and_over_positions(stream: str) -> None:
    numbers = uniform(KEYS, stream, (16,)).double().numpy()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in range(16):
        assert kstest(numbers[:, column], "uniform").pvalue > 1e-4
    many = uniform(KEYS[:1], stream, (20_000,)).double().numpy()[0]
    assert kstest(many, "uniform").pvalue > 1e-4
    counts = np.bincount((numbers.ravel() * 256).astype(int), minlength=256)
    assert chisquare(counts).pvalue > 1e-4
    lowest_bits = bits(KEYS, stream, 16).numpy() & 255
    assert chisquare(np.bincount(lowest_bits.ravel(), minlength=256)).pvalue > 1e-4


def test_neighbours_are_uncorrelated() -> None:
    """Neighbouring keys, positions, streams, epochs and seeds: |r| within 4.5 standard errors."""
    raw = torch.arange(4000)  # not hashed: the cipher alone must part them
    other_epoch = torch.from_numpy(sample_keys(3, 2, np.arange(4000)))
    other_seed = torch.from_numpy(sample_keys(4, 1, np.arange(4000)))
    numbers = uniform(raw, "crop", (8,)).numpy()
    pairs = [
        (numbers[:-1, 0], numbers[1:, 0]),
        (numbers[:, :-1].ravel(), numbers[:, 1:].ravel()),
        (numbers[:, 0], uniform(raw, "flip").numpy()),
        (uniform(KEYS, "crop").numpy(), uniform(other_epoch, "crop").numpy()),
        (uniform(KEYS, "crop").numpy(), uniform(other_seed, "crop").numpy()),
    ]
    for one, other in pairs:
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(len(one))


@given(length=st.integers(1, 70))
def test_a_permutation_holds_everything_once(length: int) -> None:
    orders = permutation(KEYS[:5], "mask", length)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(length).expand(5, length))


def test_permutations_put_everything_everywhere_equally_often() -> None:
    orders = permutation(KEYS, "mask", 8).numpy()
    for place in range(8):
        assert chisquare(np.bincount(orders[:, place], minlength=8)).pvalue > 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_bits() -> None:
    keys = KEYS.cuda()
    assert torch.equal(bits(KEYS, "crop", 100), bits(keys, "crop", 100).cpu())
    assert torch.equal(uniform(KEYS, "crop", (7, 3)), uniform(keys, "crop", (7, 3)).cpu())
    assert torch.equal(permutation(KEYS, "mask", 196), permutation(keys, "mask", 196).cpu())


def test_seeds_and_epochs_are_hashed_not_added() -> None:
    ids = np.arange(200)
    for one, other in [((1, 1), (2, 0)), ((0, 1), (1, 0)), ((5, 3), (3, 5))]:
        assert not np.intersect1d(sample_keys(*one, ids), sample_keys(*other, ids)).size


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    epochs=st.lists(st.integers(0, 2**40), min_size=1, max_size=9),
    first=st.integers(0, 2**62),
)
def test_keys_of_many_epochs_at_once_are_those_of_each(seed: int, epochs: list[int], first: int) -> None:
    ids = np.arange(first, first + len(epochs))
    together = sample_keys(seed, np.array(epochs), ids)
    assert together.tolist() == [
        int(sample_keys(seed, e, np.array([i]))[0]) for e, i in zip(epochs, ids.tolist(), strict=True)
    ]


def test_keys_of_an_epoch_never_collide() -> None:
    assert len(np.unique(sample_keys(7, 2, np.arange(200_000)))) == 200_000


def test_hash64_is_chained_splitmix64() -> None:
    # SplitMix64 from state 0 begins with this number (Vigna, prng.di.unimi.it/splitmix64.c).
    assert int(hash64(0)) == 0xE220A8397B1DCDAF


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=20))
def test_texts_hash_alike_alone_and_together(texts: list[str]) -> None:
    together = hash_texts(9, texts).tolist()
    assert together == [int(hash_texts(9, [text])[0]) for text in texts]
    assert len(set(together)) == len(set(texts))
