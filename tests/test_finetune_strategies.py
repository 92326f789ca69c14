"""Strategies: where each begins, what of it trains when, what it does with odd sets of labels."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_finetune_kit import NAMES, digits, sentences, write_images, write_tsv

from data.errors import UserError
from finetune.__main__ import STRATEGIES as OF_THE_COMMAND_LINE
from finetune.controls import RawPixels
from finetune.encoder import Encoder, load_encoder
from finetune.evaluation import evaluate
from finetune.features import accelerator_for, extract
from finetune.model import load_model
from finetune.probe import fit_linear
from finetune.run import finetune
from finetune.settings import STRATEGIES, Settings, Strategy, settings_from
from finetune.strategies import WAYS, fit_trained
from finetune.targets_class import Classification
from finetune.tasks import load_task, load_test
from finetune.train import Training
from finetune.trained_head import Rows, fit_head
from finetune.unfreezing import layers_in_training, unfreezing
from pretrain.recipe_file import load_recipe

pytest_plugins = ["test_finetune_kit"]
QUICK = {"cpu": True, "min_steps": 8, "epochs": 1.0, "batch_size": 16}
NEW: tuple[Strategy, ...] = ("frozen", "lora", "dora", "lp-ft", "gradual")


def _silent(_: str) -> None:
    pass


def test_strategies_stand_cheap_to_dear() -> None:
    order = ("knn", "linear", "frozen", "lora", "dora", "lp-ft", "gradual", "full", "scratch")
    assert order == STRATEGIES == tuple(OF_THE_COMMAND_LINE)
    assert tuple(WAYS) == STRATEGIES[3:]


@pytest.mark.parametrize("strategy", NEW)
@pytest.mark.parametrize("kind", ["images", "text"])
def test_every_saved_model_judges_as_it_did_and_is_the_same_twice(
    strategy: str,
    kind: str,
    export: Path,
    text_export: Path,
    digit_shards: tuple[Path, Path],
    sentiment: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    source, (train, test) = (export, digit_shards) if kind == "images" else (text_export, sentiment)
    written = []
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        options = {"strategy": strategy, "labels_per_class": 4, "output": tmp_path / name, "report": _silent}
        results = finetune(source, train, test, **options, **QUICK)
        assert torch.equal(torch.get_rng_state(), before)
        files = sorted(path for path in (tmp_path / name).rglob("*.safetensors"))
        written.append([path.read_bytes() for path in files])
    assert written[0] == written[1]
    assert evaluate(tmp_path / "one", test, report=_silent, cpu=True)["accuracy"] == results["accuracy"]
    one = load_model(tmp_path / "one")
    one.save(tmp_path / "copy")
    two = load_model(tmp_path / "copy")
    samples, _ = load_test(test, one.encoder, one.classes)
    assert torch.equal(one.probabilities(samples), two.probabilities(samples))
    assert (tmp_path / "copy" / "adapter").is_dir() == (strategy in ("lora", "dora"))
    inner = results["runs"][0]["chosen"]["inner_accuracy"]
    assert len(inner) >= 3


def test_lp_ft_begins_with_the_probe_s_predictions(export: Path, digit_shards: tuple[Path, Path]) -> None:
    encoder = load_encoder(export)
    task = load_task(*digit_shards, encoder)
    samples = task.train.select(np.arange(60))
    # A rate too small to move anything shows where training begins.
    settings = settings_from(QUICK | {"lr": 1e-30, "weight_decay": 0.0})
    accelerator = accelerator_for(settings)
    model = fit_trained("lp-ft", encoder, samples, task.classes, 0, settings, accelerator)
    features = extract(encoder, samples, settings, accelerator)
    probe, _ = fit_linear(features, torch.from_numpy(samples.labels), 10, 0)
    judged = extract(encoder, task.test, settings, accelerator)
    assert torch.equal(model.probabilities(task.test, settings), probe.probabilities(judged))


@pytest.mark.slow
def test_lp_ft_s_inner_probe_never_sees_what_it_is_judged_on(
    export: Path, digit_shards: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, seen = load_encoder(export), []
    samples = load_task(*digit_shards, encoder).train.select(np.arange(80))

    def spy(features: torch.Tensor, labels: torch.Tensor, *rest: object) -> object:
        seen.append(len(labels))
        return fit_linear(features, labels, *rest)

    monkeypatch.setattr("finetune.strategies.fit_linear", spy)
    settings = settings_from(QUICK)
    fit_trained("lp-ft", encoder, samples, NAMES, 0, settings, accelerator_for(settings))
    assert max(seen[:-1]) < 70
    assert seen[-1] == 80


@pytest.mark.parametrize(
    ("progress", "layers", "by", "training"),
    [
        *[(0, 3, 0.5, 0), (0.124, 3, 0.5, 0), (0.125, 3, 0.5, 1), (0.25, 3, 0.5, 2), (0.375, 3, 0.5, 3)],
        *[(0.5, 3, 0.5, 3), (1, 3, 0.5, 3), (0.49, 1, 1.0, 0), (0.5, 1, 1.0, 1), (0.999, 12, 1.0, 12)],
    ],
)
def test_layers_join_at_even_distances(progress: float, layers: int, by: float, training: int) -> None:
    assert layers_in_training(progress, layers, by) == training


@pytest.mark.parametrize("kind", ["images", "text"])
def test_unfreezing_goes_from_the_top_down(kind: str, export: Path, text_export: Path) -> None:
    encoder = load_encoder(export if kind == "images" else text_export)
    block = "model.blocks.{}.mlp.fc1.weight" if kind == "images" else "model.layers.{}.mlp.Wi.weight"
    stem = "model.patch_embed.proj.weight" if kind == "images" else "model.embeddings.tok_embeddings.weight"
    before_step = unfreezing(0.4)
    named = dict(encoder.named_parameters())
    for progress, wanted in ((0.01, 0), (0.11, 1), (0.21, 2), (0.31, 3), (0.9, 3)):
        before_step(encoder, progress)
        flags = [named[name].requires_grad for name in (block.format(1), block.format(0), stem)]
        assert flags == [True] * wanted + [False] * (3 - wanted)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_gradual_moves_only_what_has_thawed(export: Path, digit_shards: tuple[Path, Path]) -> None:
    encoder = load_encoder(export)
    samples = load_task(*digit_shards, encoder).train.select(np.arange(40))
    settings = settings_from(QUICK | {"min_steps": 20, "lr": 1e-2})
    copies: dict[float, dict[str, torch.Tensor]] = {}
    thaw = unfreezing(0.8)

    def before_step(one: Encoder, progress: float) -> None:
        copies[progress] = {name: tensor.detach().clone() for name, tensor in one.named_parameters()}
        thaw(one, progress)

    start = copy.deepcopy(encoder).requires_grad_(True)
    training = Training(lambda: start, samples, 10, 0, settings, accelerator_for(settings), None, before_step)
    training.fit((1e-2,))
    first = dict(encoder.named_parameters())
    for progress, state in copies.items():
        for name, joins in (("model.blocks.1.mlp.fc1.weight", 0.2), ("model.patch_embed.proj.weight", 0.6)):
            # What is seen before a step was moved by those before it.
            assert torch.equal(state[name], first[name]) == (progress - 0.05 < joins), (name, progress)


def test_rates_come_from_the_pre_training_where_the_export_says_it() -> None:
    assert WAYS["full"].rates({}) == (1e-4, 5e-4, 2.5e-3)
    recipe = load_recipe("mae_cifar10", ["optimizer.lr=3e-3", "optimizer.lr_scaling=none"])
    info = {"recipe": recipe.model_dump(mode="json")}
    assert WAYS["full"].rates(info) == pytest.approx((3e-4, 1e-3, 3e-3))
    assert WAYS["lp-ft"].rates(info) == WAYS["gradual"].rates(info) == WAYS["full"].rates(info)
    assert WAYS["lora"].rates(info) == WAYS["dora"].rates(info) == pytest.approx((1e-3, 3e-3, 9e-3))
    assert WAYS["scratch"].rates(info) == WAYS["scratch"].rates({}) == (3e-4, 1e-3, 3e-3)
    # SGD's rates are no measure for AdamW's.
    other = {"recipe": load_recipe("byol_cifar10").model_dump(mode="json")}
    assert WAYS["lora"].rates(other) == WAYS["lora"].rates({})


def test_a_trained_head_needs_its_hidden_layer_where_classes_are_no_half_spaces() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(600, 2, generator=draw)
    labels = (features.prod(dim=1) > 0).long()  # two opposite quadrants
    settings, target = Settings(cpu=True), Classification(["a", "b"])
    rows = Rows(features[:400], labels[:400], np.arange(400), labels[:400].numpy())
    head, chosen = fit_head(rows, target, 0, settings)
    assert chosen["hidden"] == 512
    assert (head(features[400:]).argmax(dim=1) == labels[400:]).double().mean() > 0.9
    straight, chosen = fit_head(rows, target, 0, settings.model_copy(update={"hidden": 0}))
    assert chosen["hidden"] == 0
    assert (straight(features[400:]).argmax(dim=1) == labels[400:]).double().mean() < 0.7


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", ["imbalanced", "single", "more classes than labels"])
def test_odd_sets_of_labels_work(strategy: str, case: str, text_export: Path, tmp_path: Path) -> None:
    texts, labels = sentences(24, seed=4)
    if case == "imbalanced":
        labels = ["pos"] * 22 + ["neg"] * 2
    elif case == "single":
        labels = ["neg"] + ["pos"] * 23
    else:
        texts, labels = texts[:5], [f"class {number}" for number in range(5)]
    train = write_tsv(tmp_path / "train.tsv", texts, labels)
    settings = QUICK | {"min_steps": 3, "label_smoothing": 0.1}
    budget = 1 if case == "more classes than labels" else None
    results = finetune(
        text_export, train, train, strategy=strategy, labels_per_class=budget, report=_silent, **settings
    )
    assert 0 <= results["accuracy"] <= 1
    assert json.loads(json.dumps(results)) == results


def test_one_class_is_no_task(text_export: Path, tmp_path: Path) -> None:
    train = write_tsv(tmp_path / "train.tsv", ["good", "fine"], ["pos", "pos"])
    with pytest.raises(UserError, match="one class 'pos'"):
        finetune(text_export, train, train, strategy="lora", report=_silent, **QUICK)


@pytest.mark.parametrize("strategy", ["lp-ft", "frozen", "lora"])
def test_a_class_without_a_training_label_is_learned_around(
    strategy: Strategy, export: Path, digit_shards: tuple[Path, Path]
) -> None:
    encoder = load_encoder(export)
    task = load_task(*digit_shards, encoder)
    few = replace(task, train=task.train.select(np.flatnonzero(task.train.labels < 3)[:30]))
    options = {"strategy": strategy, "label_smoothing": 0.1, "report": _silent}
    results = finetune(encoder, few, **options, **QUICK | {"min_steps": 60})
    assert results["accuracy"] > 0.12


def test_encoders_without_weights_say_which_strategies_train_none(
    export: Path, digit_shards: tuple[Path, Path]
) -> None:
    pixels = RawPixels(load_encoder(export))
    for strategy in WAYS:
        with pytest.raises(UserError, match="without weights"):
            finetune(pixels, *digit_shards, strategy=strategy, report=_silent, **QUICK)


@pytest.fixture(scope="module")
def taught(export: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """An encoder that learned from half of the digits, and the rest to train and to judge on."""
    images, labels = digits()
    root = tmp_path_factory.mktemp("taught")
    parts = {"first": slice(0, 900), "train": slice(900, 1300), "test": slice(1300, 1797)}
    first, train, test = (write_images(root / n, images[part], labels[part], NAMES) for n, part in parts.items())
    finetune(export, first, test, strategy="full", lr=1e-3, output=root / "m", report=_silent, cpu=True, crop=None)
    return root / "m" / "encoder", train, test


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_beats_chance_with_a_trained_encoder(strategy: str, taught: tuple[Path, Path, Path]) -> None:
    encoder, train, test = taught
    results = finetune(encoder, train, test, strategy=strategy, labels_per_class=5, report=_silent, cpu=True)
    assert results["interval"][0] > 0.2


@pytest.mark.parametrize("strategy", ["frozen", "lora", "lp-ft", "gradual"])
def test_quantities_are_learned_too(strategy: str, text_export: Path, tmp_path: Path) -> None:
    texts, labels = sentences(60, seed=4)
    train = tmp_path / "train.tsv"
    train.write_text(
        "text\tvalue\n" + "".join(f"{t}\t{3.5 if n == 'pos' else 1.0}\n" for t, n in zip(texts, labels, strict=True))
    )
    options = QUICK | {"strategy": strategy, "min_steps": 40, "output": tmp_path / "m"}
    results = finetune(text_export, train, train, task="regression", report=_silent, **options)
    assert results["r2"] > 0.3
    again = evaluate(tmp_path / "m", train, report=_silent, cpu=True)
    assert again["r2"] == pytest.approx(results["r2"], abs=1e-5)
