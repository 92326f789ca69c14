"""Small settings with which every objective learns on CIFAR-10 in seconds of one core, and the run that shows it."""

from __future__ import annotations

import tarfile
import time
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
from pretrain.collapse import effective_rank
from pretrain.encoders.vision import VisionConfig, eval_view
from pretrain.objectives.protocol import Objective
from pretrain.optim import build_optimizer
from pretrain.recipe import Recipe
from pretrain.schedules import warmup_cosine

TRAIN, TUNING, TEST = 500, 200, 500
"""Pictures of each class: the first two from the training split of CIFAR-10, the last from its test split."""


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


@dataclass
class Splits:
    """Pictures by what they may be used for."""

    train: Pictures
    """For training and for the bank of the probe."""
    tuning: Pictures
    """Others of the training split: settings and margins are picked on them."""
    test: Pictures
    """Of the test split: they judge, and nothing is picked on them."""


def read(archive: Path) -> Splits:
    """The first pictures of every class, by their numbers in the archive."""
    parts: dict[str, tuple[list[Tensor], list[int]]] = {name: ([], []) for name in ("train", "tuning", "test")}
    classes: dict[str, int] = {}
    with tarfile.open(archive, "r|xz") as tar:
        for member in tar:
            split, _, rest = member.name.partition("/")
            name, _, file = rest.partition("/")
            if not member.isfile():
                continue
            number = int(Path(file).stem)
            if number >= (TEST if split == "test" else TRAIN + TUNING):
                continue
            payload = tar.extractfile(member)
            assert payload is not None
            images, labels = parts["tuning" if split == "train" and number >= TRAIN else split]
            images.append(torch.from_numpy(np.array(Image.open(payload).convert("RGB")).transpose(2, 0, 1).copy()))
            labels.append(classes.setdefault(name, len(classes)))
    made = {name: Pictures(torch.stack(images), torch.tensor(labels)) for name, (images, labels) in parts.items()}
    return Splits(**made)


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


@dataclass(frozen=True)
class Gain:
    """What training made of an encoder."""

    untrained: float
    """Accuracy of the linear probe."""
    trained: float
    rank: float
    """Effective rank of the trained encoder's features, centred."""
    seconds: float
    """Processor time of the training alone."""


def gain(recipe: Recipe, pictures: Pictures, judges: Pictures) -> Gain:
    """Train on `pictures`; a probe fitted on them judges before and after."""
    assert recipe.encoder.kind == "vision"
    untrained = linear(build_objective(recipe).exported(), pictures, judges, recipe.encoder)
    started = time.process_time()
    encoder = train(recipe, pictures).exported()
    seconds = time.process_time() - started
    found = features(encoder, judges, recipe.encoder)
    rank = float(effective_rank(found - found.mean(dim=0)))
    return Gain(untrained, linear(encoder, pictures, judges, recipe.encoder), rank, seconds)
