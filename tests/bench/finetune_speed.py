"""Fine-tuning beside a loop in the style of timm's train.py: the same ViT, pictures, batch and precision, in turns.

    python tests/bench/finetune_speed.py SHARDS FOLDERS [--rounds 5] [--pictures 2000] [--steps 24] [--threads 1]

`SHARDS` are ours and `FOLDERS` the same pictures as class folders. Two measures, in pictures a second:

- **features**: pooled features of `--pictures` pictures without augmentation, from files. timm's side is its
  `create_loader` over an `ImageFolder` in this process, then the model under `torch.inference_mode`.
- **full**: steps of fine-tuning with AdamW, random resized crops (scale 0.6 to 1) and layer decay. Both sides are
  timed over `--steps` and over twice as many steps; the difference leaves out what happens once (ours: decoding
  into memory, the head's standardisation; timm's: the loader's start), so it is the cost of a further step.

Ours decodes once and keeps pictures in memory, and makes all views of a batch at once; timm's loader decodes and crops
each picture at each use. That is where an advantage comes from, beside the same network's forward and backward pass.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageDataset, create_loader
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

from finetune.encoder import load_encoder
from finetune.features import accelerator_for, extract
from finetune.settings import Settings
from finetune.tasks import load_task
from finetune.train import Training

MODEL = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "global_pool": "avg"}
ARGUMENTS |= {"fc_norm": False}
STATISTICS = (0.5, 0.5, 0.5)


def write_encoder(folder: Path) -> None:
    """An untrained encoder in timm's layout; its speed is that of a trained one."""
    import json

    model = timm.create_model(MODEL, num_classes=0, **ARGUMENTS)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    preset = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": STATISTICS, "std": STATISTICS}
    config = {"architecture": MODEL, "num_classes": 0, "model_args": ARGUMENTS, "pretrained_cfg": preset}
    (folder / "config.json").write_text(json.dumps(config))


def loader(folders: str, batch: int, training: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """timm's loader in this process."""
    extra = {"scale": (0.6, 1.0), "hflip": 0.0, "color_jitter": None} if training else {"crop_pct": 1.0}
    return create_loader(
        ImageDataset(folders),
        input_size=(3, 32, 32),
        batch_size=batch,
        is_training=training,
        use_prefetcher=False,
        no_aug=False,
        interpolation="bicubic",
        mean=STATISTICS,
        std=STATISTICS,
        num_workers=0,
        device=torch.device("cpu"),
        persistent_workers=False,
        **extra,
    )


def their_features(folders: str, encoder: Path, pictures: int, batch: int) -> None:
    """Pooled features by timm alone."""
    model, found, seen = timm.create_model(f"local-dir:{encoder}", pretrained=True).eval(), [], 0
    with torch.inference_mode():
        for images, _ in loader(folders, batch, training=False):
            found.append(model(images))
            seen += len(images)
            if seen >= pictures:
                return


def their_training(folders: str, encoder: Path, steps: int, batch: int, classes: int) -> None:
    """timm's loop: loader, model, optimiser with layer decay, clipped gradients."""
    model = timm.create_model(f"local-dir:{encoder}", pretrained=True).train()
    model.reset_classifier(classes)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    done = 0
    while True:
        for images, labels in loader(folders, batch, training=True):
            F.cross_entropy(model(images), labels).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                return


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def report(name: str, ours: list[float], theirs: list[float]) -> None:
    """Medians of the rounds, and the median of their ratios."""
    ratio = statistics.median(mine / rival for mine, rival in zip(ours, theirs, strict=True))
    print(
        f"{name:<10} {statistics.median(ours):>9,.0f} headwater {statistics.median(theirs):>9,.0f} timm   x {ratio:.2f}"
    )


def main() -> None:
    """Print pictures a second."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards")
    parser.add_argument("folders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps, batch, pictures = arguments.steps, arguments.batch, arguments.pictures
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_encoder(folder)
        task = load_task(arguments.shards, arguments.shards, load_encoder(folder))
        positions = np.linspace(0, len(task.train) - 1, pictures).astype(np.int64)
        few = task.train.select(positions)

        def settings(count: int) -> Settings:
            return Settings(cpu=True, lr=1e-3, min_steps=count, epochs=1e-6, batch_size=batch, inference_batch=batch)

        def ours(count: int) -> None:
            chosen = settings(count)
            start = lambda: load_encoder(folder).requires_grad_(True)  # noqa: E731
            Training(start, few, len(task.classes), 0, chosen, accelerator_for(chosen)).fit((1e-3,))

        def theirs(count: int) -> None:
            their_training(arguments.folders, folder, count, batch, len(task.classes))

        def our_features() -> None:
            extract(load_encoder(folder), few, settings(1), accelerator_for(settings(1)))

        rates: dict[str, tuple[list[float], list[float]]] = {"features": ([], []), "full": ([], [])}
        for turn in range(arguments.rounds):
            sides = [0, 1] if turn % 2 == 0 else [1, 0]
            for side in sides:
                work = (our_features, lambda: their_features(arguments.folders, folder, pictures, batch))[side]
                rates["features"][side].append(pictures / seconds(work))
            for side in sides:
                train = (ours, theirs)[side]
                short, long = seconds(lambda train=train: train(steps)), seconds(lambda train=train: train(2 * steps))
                rates["full"][side].append(steps * batch / max(long - short, 1e-9))
    print(f"pictures a second, batch {batch}, {arguments.threads} thread(s), medians of {arguments.rounds} rounds")
    for measure, (mine, other) in rates.items():
        report(measure, mine, other)


if __name__ == "__main__":
    main()
