"""Every recipe for pictures takes real steps once its networks are narrow and its pictures small."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pretrain.loop import take_step
from pretrain.recipe import Recipe
from pretrain.recipe_file import FOLDER, load_recipe, parse_recipe
from pretrain.setup import prepare

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if load_recipe(path).encoder.kind == "vision")
SIDE, PATCH = 32, 8
NARROW: dict[str, dict[str, Any]] = {
    "vit": {"patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "resnet": {"channels": [4, 4, 8, 8]},
    "swin": {"img_size": SIDE, "window_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1]},
}
"""What makes an encoder small, by the beginning of its name."""
SMALL = {"width": 16, "heads": 2, "depth": 1, "prototypes": 24, "queue": 12}
"""What makes an objective small, by the end of a field's name."""


def reduced(name: str, data: Path) -> Recipe:
    """The recipe with all its choices but for sizes."""
    tree = load_recipe(name).model_dump(mode="json")
    encoder = tree["encoder"]
    family = next(family for family in NARROW if encoder["model"].startswith(family))
    encoder["model_args"] |= NARROW[family]
    ratio, encoder["image_size"] = SIDE / encoder["image_size"], SIDE
    tree["objective"] = shrunk(tree["objective"], ratio)
    tree["data"] |= {"train": str(data), "canvas": 8, "workers": 0, "validation": None}
    tree["train"] |= {"batch_size": 12, "microbatch": 6, "steps": 40, "epochs": None, "precision": "no"}
    return parse_recipe(tree, name)


def shrunk(value: Any, ratio: float, field: str = "") -> Any:
    """A copy of a section with small networks, and views that keep their sizes' ratios."""
    if isinstance(value, dict):
        return {key: shrunk(child, ratio, key) for key, child in value.items()}
    if isinstance(value, list):
        return [shrunk(child, ratio, field) for child in value]
    if field == "mask_size":
        return PATCH
    if field == "size" and value:
        return max(16, round(value * ratio / PATCH) * PATCH)
    small = SMALL.get(field.rpartition("_")[2])
    return min(value, small) if small and isinstance(value, int) else value


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_takes_steps_at_reduced_size(name: str, digits: Path, tmp_path: Path) -> None:
    setup = prepare(reduced(name, digits / "train"), tmp_path)
    before = [parameter.detach().clone() for parameter in setup.state.objective.exported().parameters()]
    batches = iter(setup.loader)
    for _ in range(2):
        sums = take_step(setup, batches)
        assert sums.finite
        assert math.isfinite(sums.means["loss"])
    after = list(setup.state.objective.exported().parameters())
    assert any(not new.equal(old) for new, old in zip(after, before, strict=True))


@pytest.mark.parametrize("name", [name for name in NAMES if "imagenet" in name])
def test_published_recipes_say_how_their_data_are_sharded_and_the_run_started(name: str) -> None:
    comment = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    text = " ".join(comment)
    assert "headwater shard images IMAGENET" in text
    assert f"headwater pretrain {name} data.train=" in text
    assert " et al." in text or " and " in text
    assert any(word in text for word in ("section", "appendix", "table", "README"))
    found = load_recipe(name)
    assert found.train.precision == "bf16"
