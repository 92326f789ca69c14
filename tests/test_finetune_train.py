"""Training: deterministic bit for bit, from the right weights, blind to the test set, and it learns."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_finetune_kit import NAMES, digits, write_encoder, write_images

from finetune.encoder import Encoder, fresh, load_encoder
from finetune.features import accelerator_for, extract
from finetune.heads import LinearHead
from finetune.job import steps_for
from finetune.run import finetune
from finetune.samples import Samples
from finetune.settings import Settings, Strategy, settings_from
from finetune.strategies import fit_trained
from finetune.tasks import load_task
from finetune.train import Training

pytest_plugins = ["test_finetune_kit"]
QUICK = {"cpu": True, "min_steps": 8, "epochs": 1.0, "batch_size": 16}


def _silent(_: str) -> None:
    pass


def _same(one: Encoder, other: Encoder) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _bytes(folder: Path) -> dict[str, bytes]:
    names = ("head.safetensors", "encoder/model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("strategy", ["knn", "linear", "full", "scratch"])
def test_twice_gives_the_same_bits_and_leaves_the_random_state_alone(
    strategy: str, export: Path, digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        options = {"strategy": strategy, "labels_per_class": 4, "output": tmp_path / name, "report": _silent}
        results = finetune(export, *digit_shards, **options, **QUICK)
        assert torch.equal(torch.get_rng_state(), before)
        assert results["runs"][0]["labels"] == 40
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


@pytest.mark.parametrize("strategy", ["linear", "full"])
def test_test_labels_cannot_influence_the_model(
    strategy: str, export: Path, digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    images, labels = digits(shuffled=True)
    wrong = write_images(tmp_path / "wrong", images[1200:], labels[1200:], NAMES)
    chosen = []
    for name, test in (("right", digit_shards[1]), ("wrong", wrong)):
        options = {"strategy": strategy, "labels_per_class": 4, "output": tmp_path / f"m{name}"}
        results = finetune(export, digit_shards[0], test, report=_silent, **options, **QUICK)
        chosen.append(results["runs"][0]["chosen"])
    assert chosen[0] == chosen[1]
    assert _bytes(tmp_path / "mright") == _bytes(tmp_path / "mwrong")


def test_fresh_weights_depend_on_the_seed_alone(export: Path, text_export: Path) -> None:
    for folder in (export, text_export):
        encoder = load_encoder(folder)
        before = torch.get_rng_state()
        assert _same(fresh(encoder, 1), fresh(encoder, 1))
        assert not _same(fresh(encoder, 1), fresh(encoder, 2))
        assert not _same(fresh(encoder, 1), encoder)
        assert torch.equal(torch.get_rng_state(), before)


def test_full_starts_from_the_export_scratch_does_not_and_neither_changes_the_encoder(
    digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    export = write_encoder(tmp_path / "export", seed=77)
    encoder = load_encoder(export)
    for strategy in ("full", "scratch"):
        options = {"strategy": strategy, "labels_per_class": 2, "output": tmp_path / strategy, "lr": 1e-12}
        finetune(encoder, *digit_shards, report=_silent, **options, **QUICK)
    assert _same(encoder, load_encoder(export))
    moved = {name: load_encoder(tmp_path / name / "encoder").state_dict() for name in ("full", "scratch")}
    for name, weight in encoder.state_dict().items():
        torch.testing.assert_close(moved["full"][name], weight, rtol=0, atol=1e-9)
    name = "model.blocks.0.attn.qkv.weight"
    assert (moved["scratch"][name] - encoder.state_dict()[name]).abs().max() > 1e-2


def test_full_learns_from_few_labels(export: Path, tmp_path: Path) -> None:
    draw = np.random.Generator(np.random.Philox(5))
    labels = np.arange(240) % 3
    images = draw.integers(0, 120, (240, 16, 16))
    for i, label in enumerate(labels):  # a bright band at the class's height, anywhere across
        images[i, label * 5 : label * 5 + 5, draw.integers(0, 8) :] += 90
    classes = ["high", "middle", "low"]
    train = write_images(tmp_path / "train", images[:60].astype(np.uint8), labels[:60], classes)
    test = write_images(tmp_path / "test", images[60:].astype(np.uint8), labels[60:], classes)
    options = {"strategy": "full", "labels_per_class": 10, "cpu": True, "min_steps": 60, "crop": (0.9, 1.0)}
    results = finetune(export, train, test, report=_silent, **options)
    assert results["interval"][0] > results["majority_accuracy"] + 0.2
    tried = results["runs"][0]["chosen"]["inner_accuracy"]
    assert len(tried) == 3


def test_one_label_a_class_cannot_be_split_and_takes_the_middle_rate(
    export: Path, digit_shards: tuple[Path, Path]
) -> None:
    results = finetune(export, *digit_shards, strategy="full", labels_per_class=1, report=_silent, **QUICK)
    assert results["runs"][0]["chosen"] == {"lr": 5e-4, "steps": 8}


def test_streaming_from_shards_gives_the_same_model_as_memory(
    export: Path, digit_shards: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for name, limit in (("memory", 2.0), ("stream", 0.0)):
        monkeypatch.setattr("finetune.tasks.MEMORY_GIB", limit)
        options = {"strategy": "full", "labels_per_class": 2, "lr": 1e-3, "output": tmp_path / name}
        finetune(export, *digit_shards, report=said.append, **options, **QUICK)
    assert any("read from the shards at each use" in line for line in said)
    assert _bytes(tmp_path / "memory") == _bytes(tmp_path / "stream")


def test_several_seeds_are_summarised(export: Path, digit_shards: tuple[Path, Path]) -> None:
    encoder = load_encoder(export)
    task = load_task(*digit_shards, encoder)
    results = finetune(encoder, task, strategy="linear", labels_per_class=5, seeds=[0, 1, 2], report=_silent)
    accuracies = [run["accuracy"] for run in results["runs"]]
    assert results["accuracy"] == pytest.approx(np.mean(accuracies))
    assert results["interval"][0] < results["accuracy"] < results["interval"][1]
    assert len(set(accuracies)) > 1
    assert json.loads(json.dumps(results)) == results


def test_steps_grow_with_labels_from_a_minimum() -> None:
    settings = Settings(min_steps=300, epochs=5, batch_size=32)
    assert steps_for(10, settings) == 300
    assert steps_for(6400, settings) == 1000


def test_a_given_head_is_where_training_begins_and_each_step_is_announced(
    export: Path, digit_shards: tuple[Path, Path]
) -> None:
    encoder = load_encoder(export)
    samples = load_task(*digit_shards, encoder).train.select(np.arange(40))
    settings = settings_from(QUICK | {"lr": 1e-12})
    head = LinearHead(encoder.features, 10, seed=5)
    before, seen = head.linear.weight.clone(), []

    def announce(one: Encoder, progress: float) -> None:
        assert one is not encoder
        assert isinstance(one, Encoder)
        seen.append(progress)

    def made(one: Encoder, shown: Samples) -> LinearHead:
        assert len(shown) == len(samples)
        return copy.deepcopy(head)

    training = Training(
        lambda: copy.deepcopy(encoder), samples, 10, 0, settings, accelerator_for(settings), made, announce
    )
    _, trained, _ = training.fit((1e-12,))
    assert trained is not head
    assert torch.equal(head.linear.weight, before)
    torch.testing.assert_close(trained.linear.weight, before, rtol=0, atol=1e-9)
    assert seen == [(step + 0.5) / 8 for step in range(8)]


@pytest.mark.parametrize("strategy", ["lp-ft", "lora", "full", "scratch"])
def test_known_features_change_nothing_and_are_used_where_they_may_be(
    export: Path, digit_shards: tuple[Path, Path], strategy: Strategy
) -> None:
    """What a study keeps of its frozen strategies gives the same model; untrained weights never begin from it."""
    encoder = load_encoder(export)
    samples = load_task(*digit_shards, encoder).train.select(np.arange(24))
    settings, asked = Settings(**QUICK, trial_share=0.5), 0
    accelerator = accelerator_for(settings)

    def known(part: Samples) -> torch.Tensor:
        nonlocal asked
        asked += 1
        return extract(encoder, part, settings, accelerator)

    classes = samples.target.classes
    plain = fit_trained(strategy, encoder, samples, classes, 0, settings, accelerator)
    cached = fit_trained(strategy, encoder, samples, classes, 0, settings, accelerator, known=known)
    # Once for the inner split, whatever the number of rates, and once for all labels.
    assert asked == (0 if strategy == "scratch" else 2)
    assert len(plain.about["chosen"]["inner_accuracy"]) == 3
    assert cached.about["chosen"] == plain.about["chosen"]
    for one, other in zip(plain.encoder.parameters(), cached.encoder.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_trials_take_a_share_of_the_steps() -> None:
    settings = Settings(min_steps=100, epochs=4.0, batch_size=10, trial_share=0.25)
    assert (steps_for(20, settings.trial), steps_for(20, settings)) == (25, 100)
    assert (steps_for(1000, settings.trial), steps_for(1000, settings)) == (100, 400)


@pytest.mark.parametrize(("steps", "looked_at"), [(8, 256), (400, 320), (4000, 600)])
def test_the_head_s_input_is_standardised_over_a_share_of_what_training_sees(
    export: Path, digit_shards: tuple[Path, Path], steps: int, looked_at: int
) -> None:
    encoder = load_encoder(export)
    samples = load_task(*digit_shards, encoder).train.select(np.arange(600))
    settings = Settings(cpu=True, min_steps=steps, epochs=1e-6, batch_size=16)
    features, shown = torch.randn(2000, encoder.features), []

    def known(part: Samples) -> torch.Tensor:
        shown.append(part.ids)
        return features[torch.from_numpy(part.ids)]

    heads = [
        Training(lambda: encoder, samples, 10, seed, settings, accelerator_for(settings), known=known).first_head(
            encoder, samples
        )
        for seed in (0, 0, 1)
    ]
    assert [len(set(each)) for each in shown] == [looked_at] * 3
    assert set(shown[0]) <= set(samples.ids)
    assert np.array_equal(shown[0], shown[1])
    assert np.array_equal(shown[0], shown[2]) == (looked_at == 600)
    rows = features[torch.from_numpy(shown[0])]
    torch.testing.assert_close(heads[1].mean, rows.mean(dim=0))
    torch.testing.assert_close(heads[1].scale, 1 / rows.std(dim=0, correction=0))
