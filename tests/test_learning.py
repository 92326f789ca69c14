"""The law of learning: in seconds of one core every objective makes an encoder better than it was untrained.

Tiny settings (16-pixel views, a ViT of width 48) on 5,000 pictures of CIFAR-10's training split; a linear probe on
2,000 others of that split. Margins are about half of what was measured when the settings were picked, on these same
pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import DATASETS
from learning_kit import Pictures, features, linear, read, train

from pretrain.build import build_objective
from pretrain.collapse import effective_rank
from pretrain.recipe_file import parse_recipe

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
PAIR = {"views": [{"count": 2, "scale": [0.3, 1.0], "jitter": JITTER, "blur": None}]}
PLAIN = {"views": [{"scale": [0.5, 1.0], "jitter": None, "grey": 0.0, "blur": None}]}
CROPS = {
    "views": [
        {"count": 2, "scale": [0.4, 1.0], "jitter": JITTER, "blur": None},
        {"count": 4, "size": 8, "scale": [0.1, 0.4], "jitter": JITTER, "blur": None},
    ]
}
HEADS = PAIR | {"hidden_width": 128, "projection_width": 64}
DINO = CROPS | {
    "hidden_width": 128,
    "bottleneck_width": 32,
    "prototypes": 256,
    "momentum": 0.98,
    "teacher_temperature": [0.04, 0.04],
    "frozen_prototypes": 0.0,
}
MAE = {"name": "mae", "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "crop_scale": [0.5, 1.0]}
SIMCLR = HEADS | {"name": "simclr", "temperature": 0.2}
CASES: dict[str, tuple[int, float, dict[str, Any]]] = {
    "mae": (600, 0.02, MAE),
    "simclr": (150, 0.035, SIMCLR),
    "moco": (300, 0.035, HEADS | {"name": "moco", "momentum": 0.95, "temperature": 0.3}),
    "byol": (250, 0.015, HEADS | {"name": "byol", "momentum": 0.97}),
    "barlow_twins": (250, 0.025, PAIR | {"name": "barlow_twins", "hidden_width": 128, "projection_width": 128}),
    "vicreg": (150, 0.02, PAIR | {"name": "vicreg", "hidden_width": 256, "projection_width": 256}),
    "supervised": (250, 0.035, PLAIN | {"name": "supervised", "classes": 10}),
    "dino": (200, 0.01, DINO | {"name": "dino"}),
    "ibot": (150, 0.01, DINO | {"name": "ibot"}),
    "dinov2": (150, 0.02, DINO | {"name": "dinov2", "teacher_temperature": [0.06, 0.06]}),
    "lejepa": (
        200,
        0.015,
        PAIR | {"name": "lejepa", "hidden_width": 128, "projection_width": 16, "slices": 128},
    ),
    "simmim": (600, 0.02, PLAIN | {"name": "simmim", "mask_size": 4}),
    "mixture": (150, 0.025, {"name": "mixture", "members": {"pixels": MAE, "contrast": SIMCLR}}),
}
"""Steps of 128 pictures, the margin in accuracy over the untrained encoder, and the objective.

I-JEPA is missing: 400 steps gained 0.4 points (0.299 to 0.303), within the noise of the probe.
"""


def settings(case: str) -> dict[str, Any]:
    steps, _, objective = CASES[case]
    arguments = {
        "patch_size": 4,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "mlp_ratio": 2,
        "class_token": False,
    }
    return {
        "name": case,
        "data": {"canvas": 32},
        "encoder": {
            "kind": "vision",
            "model": "vit_tiny_patch16_224",
            "image_size": 16,
            "model_args": arguments | {"dynamic_img_size": True},
            "mean": [0.4914, 0.4822, 0.4465],
            "std": [0.2470, 0.2435, 0.2616],
        },
        "objective": objective,
        "optimizer": {"lr": 4e-3, "weight_decay": 0.05 if case in ("mae", "simmim", "ijepa") else 1e-4},
        "train": {"batch_size": 128, "steps": steps},
    }


@pytest.fixture(scope="module")
def pictures() -> tuple[Pictures, Pictures]:
    archive = Path(DATASETS) / "cifar10.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive.name} is not beside the repository (../shared/datasets)")
    return read(archive)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_learns(case: str, pictures: tuple[Pictures, Pictures]) -> None:
    known, held_out = pictures
    recipe = parse_recipe(settings(case), case)
    assert recipe.encoder.kind == "vision"
    before = linear(build_objective(recipe).exported(), known, held_out, recipe.encoder)
    encoder = train(recipe, known).exported()
    after = linear(encoder, known, held_out, recipe.encoder)
    print(f"{case}: {before:.3f} untrained, {after:.3f} trained")
    assert after > before + CASES[case][1], (before, after)
    # No collapse: features still spread over many directions.
    found = features(encoder, held_out, recipe.encoder)
    assert effective_rank(found - found.mean(dim=0)) > 4
