"""Tiny settings with which every objective learns on CIFAR-10: picked on the tuning pictures alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pretrain.recipe import Recipe
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


@dataclass(frozen=True)
class Case:
    """An objective, how long it is trained, and what it must gain."""

    steps: int
    """Of 128 pictures."""
    margin: float
    """Accuracy that it must gain over the untrained encoder: about half of what it gained on the tuning pictures."""
    objective: dict[str, Any]
    weight_decay: float = 1e-4
    lr: float = 4e-3
    image_size: int = 16
    model: dict[str, Any] = field(default_factory=dict)
    """What differs from the ViT of width 48 and depth 2 on patches of 4 pixels."""

    def recipe(self, name: str) -> Recipe:
        """The whole recipe."""
        arguments = {"patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "class_token": False}
        return parse_recipe(
            {
                "name": name,
                "data": {"canvas": 32},
                "encoder": {
                    "kind": "vision",
                    "model": "vit_tiny_patch16_224",
                    "image_size": self.image_size,
                    "model_args": arguments | {"dynamic_img_size": True} | self.model,
                    "mean": [0.4914, 0.4822, 0.4465],
                    "std": [0.2470, 0.2435, 0.2616],
                },
                "objective": self.objective,
                "optimizer": {"lr": self.lr, "weight_decay": self.weight_decay},
                "train": {"batch_size": 128, "steps": self.steps},
            },
            name,
        )


CASES: dict[str, Case] = {
    "mae": Case(600, 0.025, MAE, weight_decay=0.05),
    "simclr": Case(150, 0.035, SIMCLR),
    "moco": Case(300, 0.04, HEADS | {"name": "moco", "momentum": 0.95, "temperature": 0.3}),
    "byol": Case(250, 0.017, HEADS | {"name": "byol", "momentum": 0.97}),
    "barlow_twins": Case(250, 0.025, PAIR | {"name": "barlow_twins", "hidden_width": 128, "projection_width": 128}),
    "vicreg": Case(150, 0.02, PAIR | {"name": "vicreg", "hidden_width": 256, "projection_width": 256}),
    "supervised": Case(250, 0.038, PLAIN | {"name": "supervised", "classes": 10}),
    "dino": Case(200, 0.01, DINO | {"name": "dino"}),
    "ibot": Case(150, 0.01, DINO | {"name": "ibot"}),
    "dinov2": Case(150, 0.024, DINO | {"name": "dinov2", "teacher_temperature": [0.06, 0.06]}),
    "lejepa": Case(200, 0.017, PAIR | {"name": "lejepa", "hidden_width": 128, "projection_width": 16, "slices": 128}),
    "simmim": Case(600, 0.023, PLAIN | {"name": "simmim", "mask_size": 4}, weight_decay=0.05),
    "ijepa": Case(
        400,
        0.015,
        PLAIN | {"name": "ijepa", "momentum": 0.9, "predictor_width": 48, "predictor_depth": 2, "predictor_heads": 3},
        weight_decay=0.05,
    ),
    "mixture": Case(150, 0.028, {"name": "mixture", "members": {"pixels": MAE, "contrast": SIMCLR}}),
}
