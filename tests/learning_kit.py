"""Small settings with which every objective learns on CIFAR-10 in seconds of one core, and the run that shows it."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.batch import ImageBatch
from data.keyed import hash64, sample_keys
from pretrain.build import build_objective
from pretrain.encoders.vision import VisionConfig, eval_view
from pretrain.objectives.protocol import Objective
from pretrain.optim import build_optimizer
from pretrain.recipe import Recipe
from pretrain.schedules import warmup_cosine

TRAIN, HELD_OUT = 500, 200
"""Pictures of each class, all from the training split."""


@dataclass
class Pictures:
    """Decoded pictures in memory."""

    images: Tensor
    """uint8 (n, 3, 32, 32)."""
    labels: Tensor
    """int64 (n,)."""

    def batch(self, ids: np.ndarray, epoch: int = 0) -> ImageBatch:
        """The samples `ids`, with their keys of an epoch."""
        rows = torch.from_numpy(ids)
        return ImageBatch(
            images=self.images[rows],
            sizes=torch.full((len(ids), 2), 32),
            labels=self.labels[rows],
            keys=torch.from_numpy(sample_keys(0, epoch, ids)),
            ids=rows,
        )


def read(archive: Path) -> tuple[Pictures, Pictures]:
    """Training and held-out pictures, from the training split of the archive."""
    parts: list[tuple[list[Tensor], list[int]]] = [([], []), ([], [])]
    classes: dict[str, int] = {}
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            split, _, rest = member.name.partition("/")
            if split != "train":
                break
            name, _, file = rest.partition("/")
            if not member.isfile() or int(Path(file).stem) >= TRAIN + HELD_OUT:
                continue
            payload = tar.extractfile(member)
            assert payload is not None
            images, labels = parts[int(Path(file).stem) >= TRAIN]
            images.append(torch.from_numpy(np.array(Image.open(payload).convert("RGB")).transpose(2, 0, 1).copy()))
            labels.append(classes.setdefault(name, len(classes)))
    first, second = (Pictures(torch.stack(images), torch.tensor(labels)) for images, labels in parts)
    return first, second


@torch.no_grad()
def features(encoder: torch.nn.Module, pictures: Pictures, vision: VisionConfig) -> Tensor:
    """Pooled features of the central view, float32 (n, d)."""
    training = encoder.training
    encoder.eval()
    ids = np.arange(len(pictures.images))
    found = [encoder(eval_view(pictures.batch(part), vision)).float() for part in np.array_split(ids, len(ids) // 250)]
    encoder.train(training)
    return torch.cat(found)


def linear(encoder: torch.nn.Module, train: Pictures, held_out: Pictures, vision: VisionConfig) -> float:
    """Accuracy of a linear classifier on standardised features: ridge regression on one-hot labels, in closed form."""
    bank, queries = features(encoder, train, vision).double(), features(encoder, held_out, vision).double()
    deviation, mean = torch.std_mean(bank, dim=0)
    bank, queries = (torch.cat([(x - mean) / (deviation + 1e-6), x.new_ones(len(x), 1)], 1) for x in (bank, queries))
    penalty = 1e-2 * len(bank) * torch.eye(bank.shape[1], dtype=bank.dtype)
    weights = torch.linalg.solve(bank.T @ bank + penalty, bank.T @ F.one_hot(train.labels, 10).double())
    return ((queries @ weights).argmax(dim=1) == held_out.labels).double().mean().item()


def train(recipe: Recipe, pictures: Pictures) -> Objective:
    """The objective after the recipe's steps."""
    objective = build_objective(recipe)
    optimizer = build_optimizer(objective, recipe.optimizer)
    size, steps, count = recipe.train.batch_size, recipe.train.steps or 0, len(pictures.images)
    for step in range(steps):
        progress = (step + 0.5) / steps
        epoch, place = divmod(step * size, count - size + 1)
        order = np.argsort(hash64(epoch, np.arange(count)), kind="stable")
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(progress, recipe.optimizer.lr, 0.1) * group["lr_scale"]
        output = objective(pictures.batch(order[place : place + size], epoch), progress)
        (output.loss_sum / output.target_count).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(progress, output.statistics)
    return objective
