"""Ensembles, soups and interpolation: what must be equal is equal, and nothing is chosen on test data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_finetune_kit import NAMES, digits, write_encoder, write_images, write_text_encoder

from data.errors import UserError
from finetune.blend import blend, has_batch_norm, measure_batch_norm
from finetune.ensemble import ensemble, load_any, load_ensemble
from finetune.evaluation import evaluate
from finetune.interpolate import interpolate
from finetune.members import Member
from finetune.mixture_weights import likeliest_weights
from finetune.model import TaskModel, load_model
from finetune.predict import predict
from finetune.run import finetune
from finetune.settings import Settings
from finetune.soup import soup
from finetune.tasks import load_test

pytest_plugins = ["test_finetune_kit"]
QUICK = {"cpu": True, "min_steps": 12, "epochs": 1.0, "batch_size": 16}


def _silent(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Digits: training, validation and test, and training under classes in another order."""
    images, labels = digits()
    root = tmp_path_factory.mktemp("parts")
    parts = {"train": slice(0, 900), "validation": slice(900, 1300), "test": slice(1300, 1797)}
    made = {name: write_images(root / name, images[part], labels[part], NAMES) for name, part in parts.items()}
    return made | {"reversed": write_images(root / "reversed", images[:900], 9 - labels[:900], NAMES[::-1])}


@pytest.fixture(scope="module")
def models(export: Path, shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task models of one encoder: a probe, three fine-tuned ones, neighbours, and one with reversed classes."""
    root = tmp_path_factory.mktemp("models")
    options = {"report": _silent, "labels_per_class": 20, **QUICK}
    made = {"probe": ("linear", 0, "train"), "knn": ("knn", 0, "train"), "reversed": ("full", 0, "reversed")}
    made |= {f"tuned{seed}": ("full", seed, "train") for seed in range(3)}
    for name, (strategy, seed, data) in made.items():
        lr = {"lr": 1e-3 * (1 + seed)} if strategy == "full" else {}
        finetune(
            export,
            shards[data],
            shards["test"],
            strategy=strategy,
            seeds=[seed],
            output=root / name,
            **options,
            **lr,
        )
    return {name: root / name for name in made}


def _says(model: TaskModel, data: Path) -> torch.Tensor:
    samples, _ = load_test(data, model.encoder, model.classes)
    return model.probabilities(samples, Settings(cpu=True))


def test_an_ensemble_of_one_and_of_equals_is_that_model(models: dict[str, Path], shards: dict[str, Path]) -> None:
    for members in ([models["tuned0"]], [models["tuned0"]] * 3):
        found = ensemble(members, shards["test"], report=_silent, cpu=True)["test"]["models"]
        alone, together = found[0], found[-1]
        assert together["accuracy"] == alone["accuracy"]
        assert together["log_loss"] == pytest.approx(alone["log_loss"], abs=1e-7)
        assert together["leads"][0]["interval"] == [0.0, 0.0]


def test_members_of_any_kind_agree_after_reloading(
    models: dict[str, Path], shards: dict[str, Path], tmp_path: Path
) -> None:
    other = write_encoder(tmp_path / "other", seed=5, embed_dim=24)
    finetune(other, shards["train"], shards["test"], output=tmp_path / "small", report=_silent, cpu=True)
    members = [models["knn"], models["tuned1"], models["reversed"], tmp_path / "small"]
    results = ensemble(members, shards["test"], weights=[1, 2, 3, 2], output=tmp_path / "e", report=_silent, cpu=True)
    weights = [member["weight"] for member in results["members"]]
    assert weights == [0.125, 0.25, 0.375, 0.25]
    # Classes in another order are brought together by name: computed here from each model on its own.
    expected, names = np.zeros((497, 10)), load_model(members[0]).classes
    for member, weight in zip(members, weights, strict=True):
        model = load_model(member)
        said = _says(model, shards["test"]).numpy()
        expected += weight * said[:, [model.classes.index(name) for name in names]]
    labels = load_test(shards["test"], load_model(members[0]).encoder, names)[0].labels
    accuracy = float((expected.argmax(axis=1) == labels).mean())
    assert results["test"]["models"][-1]["accuracy"] == accuracy
    assert evaluate(tmp_path / "e", shards["test"], report=_silent, cpu=True)["accuracy"] == accuracy
    load_ensemble(tmp_path / "e").save(tmp_path / "again")
    assert evaluate(tmp_path / "again", shards["test"], report=_silent, cpu=True)["accuracy"] == accuracy
    pictures = _pictures(tmp_path / "pictures")
    rows = predict(load_any(tmp_path / "e"), [pictures], cpu=True).rows
    assert rows == predict(load_any(tmp_path / "again"), [pictures], cpu=True).rows
    singles = [{r.input: r for r in predict(load_any(m), [pictures], cpu=True).rows} for m in members]
    assert len(rows) == len(singles[0]) == 12
    assert rows[0].probability <= max(each[rows[0].input].probability for each in singles) + 1e-6


def _pictures(folder: Path) -> Path:
    from PIL import Image

    folder.mkdir()
    for number, image in enumerate(digits()[0][:12]):
        Image.fromarray(image).convert("RGB").save(folder / f"{number:02d}.png")
    return folder


def test_likeliest_weights_are_the_best_mixture() -> None:
    draw = np.random.Generator(np.random.Philox(1))
    labels = draw.integers(0, 3, 400)
    sharp = np.full((400, 3), 0.1)
    sharp[np.arange(400), np.where(draw.random(400) < 0.7, labels, (labels + 1) % 3)] = 0.8
    flat = draw.dirichlet([1, 1, 1], 400)
    first, second = likeliest_weights(np.stack([each[np.arange(400), labels] for each in (sharp, flat)], axis=1))

    def loss(weight: float) -> float:
        mixed = weight * sharp + (1 - weight) * flat
        return -float(np.log(mixed[np.arange(400), labels]).mean())

    grid = np.linspace(0, 1, 2001)
    assert first == pytest.approx(grid[np.argmin([loss(w) for w in grid])], abs=2e-3)
    assert first + second == pytest.approx(1)


def test_texts_are_read_by_each_members_tokenizer(
    text_export: Path, sentiment: tuple[Path, Path], tmp_path: Path
) -> None:
    other = write_text_encoder(tmp_path / "other", seed=3, vocabulary=290)
    for name, strategy, source in (("a", "linear", text_export), ("b", "linear", other)):
        finetune(source, *sentiment, strategy=strategy, output=tmp_path / name, report=_silent, cpu=True)
    results = ensemble([tmp_path / "a", tmp_path / "b"], sentiment[1], output=tmp_path / "e", report=_silent, cpu=True)
    texts = ["a good film", "the awful fine thing"]
    found = predict(load_any(tmp_path / "e"), texts, cpu=True).rows
    for number, row in enumerate(found):
        each = [predict(load_any(tmp_path / name), texts, cpu=True).rows[number] for name in "ab"]
        said = [one.probability if one.label == row.label else 1 - one.probability for one in each]
        assert row.probability == pytest.approx(sum(said) / 2, abs=1e-5)
    assert results["test"]["samples"] == 120


def test_a_soup_of_one_and_of_equals_is_that_model(
    models: dict[str, Path], shards: dict[str, Path], tmp_path: Path
) -> None:
    alone = _says(load_model(models["tuned0"]), shards["test"])
    for number, members in enumerate(([models["tuned0"]], [models["tuned0"]] * 3)):
        for kind in ("greedy", "uniform"):
            out = tmp_path / f"{kind}{number}"
            soup(members, shards["validation"], kind=kind, output=out, report=_silent, cpu=True)
            assert torch.equal(_says(load_model(out), shards["test"]), alone)


def test_a_soup_is_the_mean_of_weights_and_greedy_never_falls(
    models: dict[str, Path], shards: dict[str, Path], tmp_path: Path
) -> None:
    members = [models["tuned0"], models["tuned1"], models["reversed"]]
    results = soup(
        members, shards["validation"], shards["test"], kind="uniform", output=tmp_path / "s", report=_silent, cpu=True
    )
    made, parts = load_model(tmp_path / "s"), [load_model(member) for member in members]
    assert made.classes == NAMES
    name = "model.blocks.0.mlp.fc1.weight"
    mean = torch.stack([part.encoder.state_dict()[name] for part in parts]).mean(dim=0)
    torch.testing.assert_close(made.encoder.state_dict()[name], mean, atol=1e-6, rtol=1e-5)
    # The head, whatever constants it is written with and in whatever order of classes: W and b of plain features.
    direct = [_direct(part) for part in parts]
    expected = [torch.stack(each).mean(dim=0) for each in zip(*direct, strict=True)]
    for got, want in zip(_direct(made), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    best = max(entry["accuracy"] for entry in results["validation"]["members"])
    assert results["validation"]["greedy_accuracy"] >= best
    assert results["kept"][0] in [str(member) for member in members]
    entries = {entry["name"]: entry for entry in results["test"]["models"]}
    assert {"greedy soup", "uniform soup", "ensemble"} < set(entries)
    assert evaluate(tmp_path / "s", shards["test"], report=_silent, cpu=True)["accuracy"] == pytest.approx(
        entries["uniform soup"]["accuracy"]
    )


def _direct(model: TaskModel) -> tuple[torch.Tensor, torch.Tensor]:
    head, order = model.head, [model.classes.index(name) for name in NAMES]
    weight = head.linear.weight * head.scale
    return weight[order].detach(), (head.linear.bias - weight @ head.mean)[order].detach()


def test_interpolation_ends_at_its_models(models: dict[str, Path], shards: dict[str, Path], tmp_path: Path) -> None:
    results = interpolate(
        models["probe"],
        models["tuned2"],
        shards["test"],
        shifted=[shards["train"]],
        validation=shards["validation"],
        steps=5,
        output=tmp_path / "m",
        report=_silent,
        cpu=True,
    )
    for alpha, name in ((0, "probe"), (1, "tuned2")):
        again = evaluate(models[name], shards["test"], report=_silent, cpu=True)
        assert results["curve"][-1 if alpha else 0]["test"] == again["accuracy"]
    probe, tuned = load_model(models["probe"]), load_model(models["tuned2"])
    assert torch.equal(_says(blend(probe, tuned, 0.0), shards["test"]), _says(probe, shards["test"]))
    assert torch.equal(_says(blend(probe, tuned, 1.0), shards["test"]), _says(tuned, shards["test"]))
    best = max(results["curve"], key=lambda point: (point["validation"], -point["validation_log_loss"]))
    assert results["alpha"] == best["alpha"]
    saved = evaluate(tmp_path / "m", shards["test"], report=_silent, cpu=True)["accuracy"]
    assert saved == best["test"] == results["leads"]["test"]["accuracy"]
    assert interpolate(*map(load_member, (models["probe"], models["tuned2"])), shards["test"], report=_silent)[
        "alpha"
    ] == pytest.approx(0.5)


def load_member(folder: Path) -> Member:
    """A model that was loaded before."""
    return Member(folder.name, load_model(folder))


def test_what_was_held_out_in_training_serves_as_validation(
    export: Path, shards: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    finetune(export, shards["train"], strategy="linear", output=tmp_path / "m", report=_silent, cpu=True)
    said: list[str] = []
    results = soup([tmp_path / "m"], shards["train"], report=said.append, cpu=True)
    assert results["validation"]["samples"] == json.loads((tmp_path / "m/results.json").read_text())["test"]["samples"]
    assert any("held out" in line for line in said)
    with pytest.raises(UserError, match="were trained on"):
        soup([models["tuned0"]], shards["train"], report=_silent)
    with pytest.raises(UserError, match="are the same data"):
        ensemble([models["tuned0"]], shards["test"], validation=shards["test"], report=_silent)


def test_what_does_not_fit_is_refused(
    models: dict[str, Path], shards: dict[str, Path], text_export: Path, sentiment: tuple[Path, Path], tmp_path: Path
) -> None:
    images, labels = digits()
    few = write_images(tmp_path / "few", images[:300], labels[:300] % 3, ["a", "b", "c"])
    stranger = write_encoder(tmp_path / "stranger", seed=9)
    options = {"report": _silent, "labels_per_class": 2, "cpu": True}
    finetune(stranger, few, output=tmp_path / "abc", **options)
    finetune(stranger, shards["train"], output=tmp_path / "other_start", **options)
    finetune(write_encoder(tmp_path / "deep", depth=1), shards["train"], output=tmp_path / "other_shape", **options)
    finetune(text_export, *sentiment, output=tmp_path / "text", **options)
    tuned, valid = models["tuned0"], shards["validation"]
    with pytest.raises(UserError, match="other classes"):
        ensemble([tuned, tmp_path / "abc"], shards["test"], report=_silent)
    with pytest.raises(UserError, match="one kind"):
        ensemble([tuned, tmp_path / "text"], shards["test"], report=_silent)
    with pytest.raises(UserError, match="other initial weights"):
        soup([tuned, tmp_path / "other_start"], valid, report=_silent)
    with pytest.raises(UserError, match="built or fed differently"):
        soup([tuned, tmp_path / "other_shape"], valid, report=_silent)
    with pytest.raises(UserError, match="neighbours"):
        interpolate(models["knn"], tuned, shards["test"], report=_silent)
    with pytest.raises(UserError, match="2 weights do not fit 1"):
        ensemble([tuned], shards["test"], weights=[1, 1], report=_silent)
    with pytest.raises(UserError, match="nothing to judge"):
        interpolate(models["probe"], tuned, report=_silent)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("keep")
    with pytest.raises(UserError, match="already exists"):
        soup([tuned], valid, output=tmp_path / "taken", report=_silent)
    ensemble([tuned], output=tmp_path / "e", report=_silent)
    (tmp_path / "e" / "ensemble.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_any(tmp_path / "e")


@pytest.mark.slow
def test_batch_norm_is_measured_anew(shards: dict[str, Path], tmp_path: Path) -> None:
    source = write_convnet(tmp_path / "convnet")
    few = write_images(tmp_path / "few", *(each[-100:] for each in digits()), NAMES)
    options = {"strategy": "full", "labels_per_class": 1, "report": _silent, **QUICK, "lr": 3e-3, "min_steps": 3}
    for seed in range(2):
        finetune(source, shards["train"], few, seeds=[seed], output=tmp_path / f"{seed}", **options)
    members = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(UserError, match="--train"):
        soup(members, few, report=_silent)
    out = tmp_path / "soup"
    soup(members, few, kind="uniform", train=shards["validation"], output=out, report=_silent, cpu=True)
    plain = blend(load_model(members[0]), load_model(members[1]), 0.5)
    assert has_batch_norm(plain.encoder)
    made = load_model(out).encoder.state_dict()
    weights = [n for n in made if "running" not in n and "num_batches" not in n]
    assert all(torch.allclose(made[n], plain.encoder.state_dict()[n]) for n in weights)
    assert not torch.allclose(made["model.bn1.running_var"], plain.encoder.state_dict()["model.bn1.running_var"])
    samples, _ = load_test(shards["validation"], plain.encoder, NAMES)
    measure_batch_norm(plain.encoder, samples, Settings(cpu=True))
    again = plain.encoder.state_dict()
    assert all(torch.allclose(made[name], again[name], atol=1e-5) for name in made)
    # The soup of one model is that model: nothing was averaged, nothing is measured.
    soup(members[:1], few, train=shards["validation"], output=tmp_path / "one", report=_silent, cpu=True)
    assert torch.equal(_says(load_model(tmp_path / "one"), few), _says(load_model(members[0]), few))


def write_convnet(folder: Path) -> Path:
    """A small untrained ResNet in the export's layout."""
    write_encoder(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", pretrained=False, num_classes=0)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architecture": "resnet10t", "num_features": model.num_features, "model_args": {}}
    del config["pretrained_cfg"]["fixed_input_size"]
    config["pretrained_cfg"] |= {"classifier": "fc", "first_conv": "conv1.0"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    shutil.rmtree(folder / "headwater")
    return folder
