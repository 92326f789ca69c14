"""Laws of recipes: ours are valid and build, mistakes name what was meant, identity is what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_kit import BASES, recipe, tree

from data.errors import UserError
from pretrain.build import build_objective
from pretrain.recipe import Recipe
from pretrain.recipe_file import FOLDER, load_recipe, parse_recipe
from pretrain.state import differences

OURS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
NOWHERE = Path("nowhere")


@pytest.mark.parametrize("name", OURS)
def test_every_recipe_parses_and_builds_without_memory(name: str) -> None:
    found = load_recipe(name)
    if found.encoder.kind == "text" and not found.encoder.vocab_size:
        found = load_recipe(name, ["encoder.vocab_size=512"])
    with torch.device("meta"):
        objective = build_objective(found)
    assert sum(p.numel() for p in objective.exported().parameters()) > 1000
    assert parse_recipe(found.model_dump(mode="json"), "itself") == found
    assert found.name == name


def test_a_recipe_of_an_older_run_still_loads() -> None:
    """It may say whether views are to be compiled; they always are."""
    found = load_recipe("simclr_cifar10").model_dump(mode="json")
    found["train"]["compile_views"] = None
    assert parse_recipe(found, "older") == load_recipe("simclr_cifar10")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", "unknown key 'train.stepz'; did you mean train.steps?"),
        ("trian.steps=3", "unknown key 'trian'; did you mean train?"),
        ("objective.mask_ration=0.5", "did you mean objective.mask_ratio?"),
        ("encoder.modle=vit_tiny_patch16_224", "did you mean encoder.model?"),
        ("encoder.image_sise=3", "did you mean encoder.image_size?"),
        ("batch_size=3", "did you mean train.batch_size?"),
        ("optimizer.lrr=3", "unknown key 'optimizer.lrr'; did you mean optimizer.lr?"),
        ("optimizer.momentum=0.9", "unknown key 'optimizer.momentum'; known keys: betas"),
        ("optimizer.lr=-1", "'optimizer.lr' is -1: "),
        ("optimizer.betas=[0.9, 2]", "'optimizer.betas.1' is 2: "),
        ("optimizer.betas=0.9", "'optimizer.betas' is 0.9: "),
        ("optimizer={name: lars, betas: [1, 1]}", "unknown key 'optimizer.betas'; known keys: decay"),
        ("optimizer={name: lars, momentun: 1}", "did you mean optimizer.momentum?"),
        ("optimizer={name: adam}", "'optimizer.name' is 'adam'; it must be one of: adamw, lamb, sgd, lars, muon"),
        ("optimizer={name: sgd, momentum: 0, nesterov: true}", "nesterov needs a momentum"),
        ("optimizer={schedule: wsd, warmup: 0.9}", "add up to more than the whole training"),
        ("data.validation=[3]", "'data.validation' is [3]: "),
        ("train.lr=3", "did you mean optimizer.lr?"),
        ("watch.xyzzy=3", "known keys: checkpoint_every"),
        ("train.batch_size=many", "'train.batch_size' is 'many'"),
        ("train.batch_size=0", "'train.batch_size' is 0"),
        ("train.steps=-4", "'train.steps' is -4"),
        ("watch.log_every=0", "'watch.log_every' is 0"),
        ("watch.checkpoint_every=0", "'watch.checkpoint_every' is 0"),
        ("train.ema=1", "'train.ema' is 1"),
        ("encoder.std=[0, 1, 1]", "encoder.std"),
        ("objective.mask_ratio=1.5", "'objective.mask_ratio' is 1.5"),
        ("objective.decoder_width=17", "multiple of decoder_heads"),
        ("objective.crop_scale=[1, 0.5]", "must rise"),
        ("encoder.kind=visoin", "'encoder.kind' is 'visoin'; it must be one of: vision, text"),
        ("objective.name=mea", "'objective.name' is 'mea'; it must be one of: mae, "),
        ("objective=mae", "'objective' is 'mae'"),
        ("encoder=kind", "'encoder' is 'kind'"),
        ("objective={name: next_token}", "needs an encoder of kind text, not vision"),
        ("name=a/b", "'name' is 'a/b'"),
        ("train.steps", "'train.steps' is no override"),
        ("train.epochs.more=3", "epochs holds a value, not keys"),
        ("train.steps=[3", "is no valid YAML value"),
        ("train={batch_size: 3}", "exactly one of train.steps and train.epochs"),
    ],
)
def test_mistakes_name_what_was_meant(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("mae_cifar10", [override])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "contrast.temprature=3",
            "'objective.members.contrast.temprature'; did you mean objective.members.contrast.temp",
        ),
        ("contrast.temperature=-3", "'objective.members.contrast.temperature' is -3"),
        (
            "contrast.views=[{count: 2, jitter: {hew: 1}}]",
            "did you mean objective.members.contrast.views.0.jitter.hue?",
        ),
        ("pixels.decoder_width=17", "multiple of decoder_heads"),
        ("pixels.name=mea", "'objective.members.pixels.name' is 'mea'; it must be one of: mae, simmim"),
    ],
)
def test_mistakes_inside_mixtures_are_found_where_they_are(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("mae_simclr_cifar10", [f"objective.members.{override}"])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1, 2]", "is no recipe"),
        (b"a: [", "is no valid YAML"),
        (b"\xff\xfe\x00", "recipe"),
        (b"name: x", "'encoder' is missing; 'objective' is missing"),
        (b"", "is no recipe"),
    ],
)
def test_files_that_are_no_recipe(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.yaml") as caught:
        load_recipe(tmp_path / "bad.yaml")
    assert words in str(caught.value)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="mae_cifar10"):
        load_recipe("mae_cifar")


def test_a_folder_of_a_recipe_s_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mae_cifar10").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("mae_cifar10").name == "mae_cifar10"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimizer.lr=1e-3", "optimizer", "lr", 1e-3),
        ("train.precision=no", "train", "precision", "no"),
        ("optimizer.betas=[0.8, 9e-1]", "optimizer", "betas", (0.8, 0.9)),
        ("encoder.model_args.depth=3", "encoder", "model_args", {"depth": 3}),
        ("train.clip=null", "train", "clip", None),
        ("data.validation=0.1", "data", "validation", 0.1),
        ("data.validation=shards/valid", "data", "validation", "shards/valid"),
        ("data.train=nan", "data", "train", "nan"),
        ("watch.trackers=[tensorboard]", "watch", "trackers", ["tensorboard"]),
        ("train.compile=true", "train", "compile", True),
    ],
)
def test_overrides_reach_their_key(override: str, section: str, key: str, value: Any) -> None:
    found = getattr(getattr(load_recipe("mae_cifar10", [override]), section), key)
    assert (found | value if isinstance(value, dict) else found) == (found if isinstance(value, dict) else value)
    if isinstance(value, dict):
        assert found.items() >= value.items()


def test_steps_and_epochs_exclude_each_other_and_the_later_word_counts() -> None:
    epochs = load_recipe("mae_cifar10", ["train.epochs=2", "train.batch_size=100"])
    assert epochs.steps(1049) == 21
    assert epochs.steps(3) == 1
    assert load_recipe("mae_cifar10", ["train.epochs=2", "train.steps=7"]).steps(1000) == 7
    assert load_recipe("mae_cifar10", ["train.steps=7", "train.epochs=1", "train.batch_size=10"]).steps(1000) == 100


def changed(settings: dict[str, Any]) -> Recipe:
    return recipe("mae", NOWHERE, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"watch.log_every": 7},
        {"watch.trackers": ["tensorboard"]},
        {"data.workers": 5},
        {"data.train": "elsewhere"},
        {"data.validation": "other/shards"},
        {"train.skips": 3},
        {"train.microbatch": 4},
        {"train.shard": True},
        {"train.compile": True},
        {"train.deterministic": True},
        {"watch.checkpoint_keep": 7},
        {"watch.checkpoint_keep_every": 100},
        {"name": "other"},
    ],
)
def test_identity_ignores_what_changes_nothing(settings: dict[str, Any]) -> None:
    assert changed(settings).identity() == changed({}).identity()
    assert changed(settings).hash() == changed({}).hash()


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 1},
        {"optimizer.weight_decay": 0.1},
        {"train.precision": "bf16"},
        {"train.clip": 0.1},
        {"objective.mask_ratio": 0.5},
        {"optimizer.lr": 1.0},
        {"train.batch_size": 8},
        {"train.steps": 13},
        {"train.ema": 0.9},
        {"data.validation": 0.1},
        {"data.canvas": 9},
        {"encoder.model_args.drop_rate": 0.1},
    ],
)
def test_identity_sees_what_changes_the_training(settings: dict[str, Any]) -> None:
    old, new = changed({}).identity(), changed(settings).identity()
    assert changed(settings).hash() != changed({}).hash()
    (key,) = settings
    assert [line.partition(":")[0] for line in differences(old, new)] == [key]


def test_a_field_that_an_older_version_lacked_is_no_difference() -> None:
    new = changed({}).identity()
    old = {section: dict(v) if isinstance(v, dict) else v for section, v in new.items()}
    del old["train"]["clip"]
    old["train"]["removed_since"] = 3
    assert differences(old, new) == []


def test_the_hash_tells_objectives_apart() -> None:
    hashes = {parse_recipe(tree(name, NOWHERE, {}), name).hash() for name in BASES}
    assert len(hashes) == len(BASES)
