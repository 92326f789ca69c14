"""Laws of mixtures: exact proportions, each dataset once an epoch of its own, resume at any position."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import picture, write_pictures
from hypothesis import given, settings
from hypothesis import strategies as st

from data.cycle import LONGEST_CYCLE, Cycle, exact_shares
from data.dataset import ShardedDataset
from data.encoded import EncodedLoader
from data.errors import UserError
from data.loader import Loader, sequential
from data.mixture import Mixture, open_samples
from data.shards import DatasetWriter

CANVAS = 8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    home = tmp_path_factory.mktemp("mixture")
    return [write_pictures(home / name, count, 7) for name, count in (("large", 40), ("small", 11), ("third", 20))]


@pytest.fixture(scope="module")
def mixture(folders: list[Path]) -> Mixture:
    return Mixture([ShardedDataset(folder) for folder in folders], [3, 2, 0.5])


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 99), st.integers(0, 10**9))
def test_every_cycle_holds_exactly_the_shares(shares: list[int], seed: int, first: int) -> None:
    cycle = Cycle(shares, seed)
    start = first * cycle.length
    datasets, ranks = cycle.locate(np.arange(start, start + cycle.length))
    assert np.bincount(datasets, minlength=len(shares)).tolist() == shares
    for number, share in enumerate(shares):
        # The samples of a dataset are counted through from the start of training.
        assert ranks[datasets == number].tolist() == list(range(first * share, (first + 1) * share))


@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.data())
def test_a_group_alone_is_what_it_is_in_the_whole(shares: list[int], data: st.DataObject) -> None:
    cycle = Cycle(shares, 3)
    whole = np.stack(cycle.locate(np.arange(6 * cycle.length)))
    wanted = np.array(data.draw(st.lists(st.integers(0, 6 * cycle.length - 1), min_size=1, max_size=20)))
    assert np.array_equal(np.stack(Cycle(shares, 3).locate(wanted)), whole[:, wanted])


@pytest.mark.parametrize(
    ("weights", "shares"),
    [([1], [1]), ([0.7, 0.2, 0.1], [7, 2, 1]), ([2, 4], [1, 2]), ([1.5, 1], [3, 2]), ([0.1, 0.3], [1, 3])],
)
def test_weights_mean_what_they_say(weights: list[float], shares: list[int]) -> None:
    assert exact_shares(weights) == shares


@pytest.mark.parametrize("weights", [[], [0, 1], [-1, 2], [float("nan"), 1], [float("inf"), 1], [1 / 3, 1 / 7]])
def test_what_is_no_proportion_is_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match=f"proportions|more than {LONGEST_CYCLE}"):
        exact_shares(weights)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 500),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 1, 3]),
    st.integers(0, 3),
)
def test_batches_are_the_same_for_any_split_and_start(
    mixture: Mixture, start: int, world_size: int, lanes: int, microbatch: int | None, seed: int
) -> None:
    """Laws 3 and 5, over mixtures, lanes, ranks, microbatches and starts."""
    size, batches = 24, 5
    stream = mixture.stream(seed, lanes)
    epochs, ids = stream.locate(np.arange(start, start + batches * size))
    expected = [
        Counter(zip(e, i, strict=True))
        for e, i in zip(epochs.reshape(batches, size).tolist(), ids.reshape(batches, size).tolist(), strict=True)
    ]
    if microbatch and 24 // world_size % microbatch:
        return
    found: list[list[int]] = [[] for _ in range(batches)]
    for rank in range(world_size):
        loader = Loader(mixture, size, seed, rank, world_size, start, canvas=CANVAS, microbatch=microbatch, lanes=lanes)
        for number, batch in enumerate(islice(loader, batches * loader.accumulation)):
            found[number // loader.accumulation] += batch.ids.tolist()
        assert loader.position == start + batches * size
    assert [Counter(batch) for batch in found] == [Counter(i for _, i in batch.elements()) for batch in expected]
    whole = Loader(mixture, size, seed, start=start, canvas=CANVAS, lanes=lanes)
    assert [batch.ids.tolist() for batch in islice(whole, batches)] == found


@pytest.mark.parametrize("lanes", [1, 3])
def test_each_dataset_is_read_once_in_an_epoch_of_its_own(mixture: Mixture, lanes: int) -> None:
    stream = mixture.stream(0, lanes)
    epochs, ids = stream.locate(np.arange(12 * 11 * 40))
    for number, dataset in enumerate(mixture.datasets):
        own = (ids >= mixture.id_starts[number]) & (ids < mixture.id_starts[number + 1])
        pairs = list(zip(epochs[own].tolist(), ids[own].tolist(), strict=True))
        assert len(set(pairs)) == len(pairs)
        whole = max(epochs[own])  # the last epoch is unfinished
        assert whole >= 2
        assert all(sum(e == epoch for e, _ in pairs) == len(dataset) for epoch in range(whole))


def test_pictures_and_labels_are_those_of_their_datasets(mixture: Mixture, folders: list[Path]) -> None:
    sizes = [40, 11, 20]
    assert len(mixture) == 71
    payloads, labels = mixture.pictures(np.arange(71))
    expected = [(picture(n, 5 + n % 4, 5 + n % 3), n % 3) for size in sizes for n in range(size)]
    assert list(zip(payloads, labels.tolist(), strict=True)) == expected
    assert mixture.labels().tolist() == labels.tolist()
    assert mixture.key(45) == "c/00005"
    assert Path(mixture.shard_name(45)).parent == folders[1]
    assert mixture.ids(np.array([mixture.shard(45)]), np.array([5])).tolist() == [45]
    batch = next(sequential(mixture, 71, canvas=CANVAS))
    assert batch.labels.tolist() == labels.tolist()
    encoded = next(iter(EncodedLoader(mixture, 10, workers=2)))
    assert encoded.payloads == [payloads[number] for number in encoded.ids]


def test_classes_are_joined_by_name(tmp_path: Path) -> None:
    for name, classes in (("a", ["cat", "dog"]), ("b", ["dog", "ape"]), ("c", [])):
        with DatasetWriter(tmp_path / name, "images", 5) as writer:
            writer.extra = {"classes": classes}
            for number in range(2):
                writer.add(f"{number}", {"png": picture(number)}, number)
    mixture = open_samples({str(tmp_path / name): 1 for name in "abc"})
    assert mixture.classes == ["cat", "dog", "ape"]
    assert mixture.labels().tolist() == [0, 1, 1, 2, -1, -1]  # numbers without names mean nothing here


def test_proportions_and_datasets_are_part_of_the_fingerprint(folders: list[Path]) -> None:
    def fingerprint(weights: list[float]) -> str:
        return open_samples({str(folder): weight for folder, weight in zip(folders, weights, strict=False)}).fingerprint

    assert fingerprint([1, 2]) == fingerprint([0.5, 1])
    assert len({fingerprint(weights) for weights in ([1, 2], [2, 1], [1, 2, 1], [1])}) == 4


def test_a_split_keeps_the_proportions(mixture: Mixture) -> None:
    train, valid = mixture.split(0.3)
    assert sorted([*train.all_ids(), *valid.all_ids()]) == list(range(71))
    assert train.shares == mixture.shares == [6, 4, 1]


def test_kinds_and_tokenizers_must_agree(folders: list[Path], tmp_path: Path) -> None:
    from data.text import shard_text

    for name, words in (("x", "the quick brown fox jumps over the lazy dog "), ("y", "a stitch in time saves nine ")):
        (tmp_path / f"{name}.txt").write_text(words * 40)
        shard_text([tmp_path / f"{name}.txt"], tmp_path / name, vocab_size=270, validation=0, progress=False)
    text = {name: str(tmp_path / name) for name in "xy"}
    with pytest.raises(UserError, match="mix one kind only"):
        open_samples({str(folders[0]): 1, text["x"]: 1}, context=8)
    with pytest.raises(UserError, match="different tokenizers; shard one again with --tokenizer"):
        open_samples({text["x"]: 1, text["y"]: 1}, context=8)
    shard_text([tmp_path / "y.txt"], tmp_path / "z", tokenizer=tmp_path / "x", validation=0, progress=False)
    mixed = open_samples({text["x"]: 1, str(tmp_path / "z"): 3}, context=8)
    assert next(iter(Loader(mixed, 8))).tokens.shape == (8, 9)


def test_a_recipe_names_datasets_and_weights(folders: list[Path]) -> None:
    from pretrain.build import open_data
    from pretrain.recipe_file import load_recipe

    large, small, _ = map(str, folders)
    settings = [f"data.train={{{large}: 0.75, {small}: 0.25}}", "data.canvas=8", "data.validation=0.2"]
    recipe = load_recipe("mae_cifar10", settings)
    data = open_data(recipe)
    assert isinstance(data.train, Mixture)
    assert data.train.shares == [3, 1]
    assert data.validation is not None
    assert len(data.train) + len(data.validation) == 51
    assert isinstance(open_data(load_recipe("mae_cifar10", [f"data.train={{{large}: 2}}"])).train, ShardedDataset)
    # Weights are told apart by the fingerprint; lanes and the extent of the shuffle by the recipe.
    for setting in ("data.lanes=2", "data.shuffle_samples=100"):
        assert load_recipe("mae_cifar10", [*settings, setting]).hash() != recipe.hash()
    with pytest.raises(UserError, match="no proportions"):
        open_data(load_recipe("mae_cifar10", [f"data.train={{{large}: 1, {small}: 0}}"]))


def test_a_run_over_a_mixture_goes_on_with_other_processes(folders: list[Path]) -> None:
    """Half an epoch by one process, the rest by two: the batches of the straight run."""
    mixture = open_samples({str(folder): weight for folder, weight in zip(folders, (5, 2, 1), strict=True)})
    arguments = {"batch_size": 8, "canvas": CANVAS, "lanes": 2, "seed": 1}
    straight = [batch.ids.tolist() for batch in islice(Loader(mixture, **arguments), 10)]
    first = Loader(mixture, **arguments)
    assert [batch.ids.tolist() for batch in islice(first, 4)] == straight[:4]
    ranks = [Loader(mixture, **arguments, rank=rank, world_size=2, start=first.position) for rank in range(2)]
    rest = [[b.ids.tolist() for b in islice(loader, 6)] for loader in ranks]
    assert [a + b for a, b in zip(*rest, strict=True)] == straight[4:]
