"""CIFAR-10, end to end: what MAE pre-training gives a linear probe, beside the same encoder untrained.

    python tests/bench/images_end_to_end.py FOLDER_WITH_train_AND_test WORK_FOLDER [key=value …]

Shards both sides, pre-trains `mae_cifar10` on the training pictures without their labels (resuming if the
work folder has a run), exports, and judges a linear probe, fitted on all training labels, on the test pictures.
Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from data.image_shards import shard_images
from finetune.encoder import fresh, load_encoder
from finetune.run import finetune
from finetune.tasks import load_task
from pretrain.loop import train
from pretrain.recipe_file import load_recipe


def main(source: Path, work: Path, settings: list[str]) -> None:
    """Run the stages that are still missing and print the result."""
    for side in ("train", "test"):
        if not (work / "shards" / side).exists():
            shard_images(source / side, work / "shards" / side)
    began = time.monotonic()
    recipe = load_recipe("mae_cifar10", [f"data.train={work / 'shards' / 'train'}", *settings])
    export = train(recipe, work / "run")
    result: dict = {"recipe": recipe.name, "settings": settings, "minutes": round((time.monotonic() - began) / 60, 1)}
    encoder = load_encoder(export)
    task = load_task(work / "shards" / "train", work / "shards" / "test", encoder)
    for name, features in {"pre-trained": encoder, "untrained": fresh(encoder, seed=0)}.items():
        judged = finetune(features, task, strategy="linear", report=print)
        result[f"{name}, linear probe"] = {"accuracy": judged["accuracy"], "interval": judged["interval"]}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
