"""Tiny recipes and data that the pre-training tests share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from data.embedded import shard_digits
from data.text import shard_text
from pretrain.recipe import Recipe
from pretrain.recipe_file import parse_recipe

REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}

MAE: dict[str, Any] = {
    "name": "tiny_mae",
    "data": {"canvas": 8, "workers": 0},
    "encoder": {
        "kind": "vision",
        "model": "vit_tiny_patch16_224",
        "image_size": 16,
        "model_args": {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2, "class_token": False},
    },
    "objective": {"name": "mae", "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2, "crop_scale": [0.6, 1.0]},
    "optimizer": {"lr": 2e-3},
    "train": {"batch_size": 16, "steps": 12},
    "watch": {"log_every": 1, "evaluate_every": 0, "checkpoint_every": 4},
}
NEXT_TOKEN: dict[str, Any] = {
    "name": "tiny_text",
    "data": {"workers": 0},
    "encoder": {"kind": "text", "width": 32, "depth": 1, "heads": 2, "intermediate_size": 32, "context": 32},
    "objective": {"name": "next_token"},
    "optimizer": {"lr": 2e-3},
    "train": {"batch_size": 8, "steps": 12},
    "watch": {"log_every": 1, "evaluate_every": 0, "checkpoint_every": 4},
}
_TWO_VIEWS = {"views": [{"count": 2, "scale": [0.5, 1.0]}], "hidden_width": 16}
_CROPS = {
    "views": [{"count": 2, "scale": [0.5, 1.0]}, {"count": 2, "size": 8, "scale": [0.2, 0.5]}],
    "hidden_width": 16,
}
_DINO = _CROPS | {"bottleneck_width": 8, "prototypes": 12, "momentum": 0.9, "frozen_prototypes": 0.1}
_ONE: dict[str, Any] = {"views": [{"scale": [0.5, 1.0], "jitter": None, "grey": 0.0, "blur": None}]}
PICTURES: dict[str, dict[str, Any]] = {
    "simclr": _TWO_VIEWS | {"name": "simclr", "projection_width": 8, "temperature": 0.5},
    "moco": _TWO_VIEWS | {"name": "moco", "projection_width": 8, "momentum": 0.9, "queue": 24},
    "byol": _TWO_VIEWS | {"name": "byol", "projection_width": 8, "momentum": 0.9},
    "barlow_twins": _TWO_VIEWS | {"name": "barlow_twins", "projection_width": 8},
    "lejepa": _CROPS | {"name": "lejepa", "projection_width": 6, "slices": 20},
    "simmim": _ONE | {"name": "simmim", "mask_size": 4},
    "ijepa": _ONE
    | {"name": "ijepa", "predictor_width": 16, "predictor_depth": 1, "predictor_heads": 2, "momentum": 0.9},
    "supervised": _ONE | {"name": "supervised", "classes": 10, "mix": {}},
    "mixture": {
        "name": "mixture",
        "weights": {"contrast": 0.5},
        "export": "teacher",
        "members": {
            "teacher": _DINO | {"name": "dino", "koleo_weight": 0.1},
            "contrast": _TWO_VIEWS | {"name": "simclr", "projection_width": 8, "temperature": 0.5},
            "pixels": MAE["objective"],
            "latents": _DINO | {"name": "ibot"},
        },
    },
    "dino": _DINO | {"name": "dino"},
    "ibot": _DINO | {"name": "ibot", "mask_probability": 0.8},
    "dinov2": _DINO | {"name": "dinov2"},
    "vicreg": _TWO_VIEWS | {"name": "vicreg", "projection_width": 8},
}
"""Objectives for pictures beside MAE, over the same tiny ViT, which takes views of any size."""
_ANY_SIZE = MAE["encoder"] | {"model_args": MAE["encoder"]["model_args"] | {"dynamic_img_size": True}}
TEXTS = ("next_token", "masked_language", "hybrid", "replaced_token")
"""Objectives over text, over the same tiny transformer."""
MASKED_LANGUAGE: dict[str, Any] = NEXT_TOKEN | {"objective": {"name": "masked_language", "masked": 0.8}}
NORMS = {"encoder.model": "resnet18_cifar", "encoder.model_args": {"channels": [4, 4, 8, 8], "layers": [1, 1, 1, 1]}}
"""Settings for a tiny encoder with BatchNorm, whose running statistics are state too."""
HYBRID: dict[str, Any] = NEXT_TOKEN | {"objective": {"name": "hybrid", "causal": {"fill_in_middle": 0.5}}}
REPLACED_TOKEN: dict[str, Any] = NEXT_TOKEN | {"objective": {"name": "replaced_token"}}
BASES = {
    "mae": MAE,
    "next_token": NEXT_TOKEN,
    "masked_language": MASKED_LANGUAGE,
    "hybrid": HYBRID,
    "replaced_token": REPLACED_TOKEN,
} | {
    name: MAE | {"name": f"tiny_{name}", "objective": objective, "encoder": _ANY_SIZE}
    for name, objective in PICTURES.items()
}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's digits: a folder with the shards `train` and `test`."""
    out = tmp_path_factory.mktemp("digits")
    shard_digits(out)
    return out


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of short documents of very different lengths."""
    folder = tmp_path_factory.mktemp("sentences")
    lines = [f"{n} bottles of beer on the wall, " * (1 + n % 7) + "so it goes." for n in range(400)]
    (folder / "text.txt").write_text("\n".join(lines))
    shard_text([folder / "text.txt"], folder / "shards", vocab_size=300, document="line", progress=False)
    return folder / "shards"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Accelerate keeps one state a process; each test starts with none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)


def tree(objective: str, data: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe of an objective over `data`, with settings such as `{"train.steps": 3}`."""
    copy: dict[str, Any] = yaml.safe_load(yaml.safe_dump(BASES[objective]))
    for key, value in ({"data.train": str(data)} | settings).items():
        node = copy
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return copy


def recipe(objective: str, data: Path, settings: dict[str, Any] | None = None) -> Recipe:
    """The same as a checked recipe."""
    return parse_recipe(tree(objective, data, settings or {}), "the test's recipe")


def write_recipe(path: Path, objective: str, data: Path, settings: dict[str, Any] | None = None) -> Path:
    """The same as a file."""
    path.write_text(yaml.safe_dump(tree(objective, data, settings or {})))
    return path


def run(*words: str | Path, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS` to its end and return it, output as text."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


def two_workers(worker: str, folder: Path, *words: str | Path, timeout: float = 300) -> list[Any]:
    """What the script `worker` of this folder, `worker OUT WORDS`, saved to OUT in each of two connected processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script, processes = Path(__file__).with_name(worker), []
    for rank in (0, 1):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(script), str(folder / f"{rank}.pt"), *map(str, words)]
        processes.append(subprocess.Popen(command, env=ENVIRONMENT | place, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=timeout)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
