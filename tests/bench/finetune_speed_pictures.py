"""The contests on pictures: the same untrained ViT, the same pictures, spread over all classes.

- **features**: pooled features without augmentation, from encoded files. timm's side is its `create_loader` over an
  `ImageDataset` in this process, then the model under `torch.inference_mode`.
- **full**: AdamW, random resized crops (scale 0.6 to 1), layer decay, a cosine schedule. timm's side is the loop of
  its `train.py` with its own optimiser groups and scheduler.

Ours decodes once and keeps pictures in memory, and makes all views of a batch at once; timm's loader decodes and crops
each picture at each use.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
from finetune_speed import Contest
from safetensors.torch import save_file
from timm.data import ImageDataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.encoder import Encoder, load_encoder
from finetune.features import accelerator_for, extract
from finetune.reading import read
from finetune.samples import ImageSamples
from finetune.settings import Settings
from finetune.train import Training

MODEL = "vit_tiny_patch16_224"
ARGUMENTS = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "global_pool": "avg"}
ARGUMENTS |= {"fc_norm": False}
STATISTICS = (0.5, 0.5, 0.5)
LR = 1e-3


def write_encoder(folder: Path) -> Path:
    """An untrained encoder in timm's layout; its speed is that of a trained one."""
    folder.mkdir()
    model = timm.create_model(MODEL, num_classes=0, **ARGUMENTS)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    preset = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": STATISTICS, "std": STATISTICS}
    config = {"architecture": MODEL, "num_classes": 0, "model_args": ARGUMENTS, "pretrained_cfg": preset}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Timm:
    """timm alone, on some of the pictures in class folders."""

    def __init__(self, folders: Path, names: list[str], encoder: Path, batch: int) -> None:
        """`names` are the pictures' paths below `folders`, without their endings."""
        self.folders, self.encoder, self.batch = folders, encoder, batch
        found = {str(Path(path).relative_to(folders).with_suffix("")): path for path in sorted(folders.rglob("*.*"))}
        missing = [name for name in names if name not in found]
        if missing:
            raise SystemExit(f"{folders} lacks {len(missing)} pictures of the shards, such as {missing[0]}")
        self.paths = [str(found[name]) for name in names]
        self.model = self._model().eval()

    def _model(self) -> nn.Module:
        return timm.create_model(f"local-dir:{self.encoder}", pretrained=True)

    def loader(self, training: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """timm's loader in this process."""
        dataset = ImageDataset(str(self.folders))
        labels = dict(dataset.reader.samples)
        dataset.reader.samples = [(path, labels[path]) for path in self.paths]
        extra = {"scale": (0.6, 1.0), "hflip": 0.0, "color_jitter": None} if training else {"crop_pct": 1.0}
        return create_loader(
            dataset,
            input_size=(3, 32, 32),
            batch_size=self.batch,
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

    def features(self, count: int) -> Tensor:
        """Of all pictures, in order."""
        with torch.inference_mode():
            return torch.cat([self.model(images) for images, _ in self.loader(training=False)])

    def train(self, steps: int) -> nn.Module:
        """timm's loop: loader, model, optimiser with layer decay, schedule, clipped gradients."""
        loader, done, model = self.loader(training=True), 0, self._model().train()
        model.reset_classifier(len({Path(path).parent for path in self.paths}))
        optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=0.05, layer_decay=0.75)
        schedule = CosineLRScheduler(
            optimizer, t_initial=steps, warmup_t=steps // 10, warmup_lr_init=1e-6, t_in_epochs=False
        )
        while True:
            for images, labels in loader:
                F.cross_entropy(model(images), labels).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                schedule.step_update(done)
                if done == steps:
                    return model


class Ours:
    """This project, on the same pictures in shards."""

    def __init__(self, shards: Path, encoder: Path, count: int, batch: int) -> None:
        self.encoder, self.batch = encoder, batch
        self.model = load_encoder(encoder)
        found = read(shards, self.model, "classification", None)
        positions = np.linspace(0, len(found.samples) - 1, count).astype(np.int64)
        self.names = [found.names[i] for i in positions]
        samples = found.samples.select(positions)
        assert isinstance(samples, ImageSamples)
        self.samples = samples

    def settings(self, steps: int = 1) -> Settings:
        """One rate, so many steps."""
        return Settings(
            cpu=True, lr=LR, min_steps=steps, epochs=1e-6, batch_size=self.batch, inference_batch=self.batch
        )

    def features(self, count: int) -> Tensor:
        """Of all pictures, in order, decoded on the way."""
        return extract(self.model, self.samples, self.settings(), accelerator_for(self.settings()))

    def train(self, steps: int) -> nn.Module:
        """`full`, as `finetune.run` does it: decode into memory, then the steps."""
        samples, settings = self.samples.select(np.arange(len(self.samples))), self.settings(steps)
        samples.decode()
        classes = int(samples.labels.max()) + 1
        training = Training(self._start, samples, classes, 0, settings, accelerator_for(settings))
        encoder, head, _ = training.fit((LR,))
        return nn.ModuleList([encoder, head])

    def _start(self) -> Encoder:
        return load_encoder(self.encoder).requires_grad_(True)


def picture_contests(arguments: argparse.Namespace, folder: Path) -> list[Contest]:
    """Both, on `arguments.samples` pictures."""
    encoder = write_encoder(folder / "encoder")
    batch, count = arguments.picture_batch, arguments.samples
    ours = Ours(arguments.shards, encoder, count, batch)
    theirs = Timm(arguments.folders, ours.names, encoder, batch)
    return [
        Contest("pictures: features, from files", "timm's loader and model", (ours.features, theirs.features), count),
        Contest("pictures: full", "timm's loop", (ours.train, theirs.train), arguments.steps, batch),
    ]
