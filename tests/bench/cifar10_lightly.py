"""lightly's CIFAR-10 benchmark loop, built from lightly's parts, timed on this device.

What its script (docs/source/getting_started/benchmarks/cifar10_benchmark.py) does in a training epoch: pictures from a
folder, its two-view transform in DataLoader workers, its ResNet-18, heads and losses, SGD, float32; without Lightning
around it and without the kNN pass of each epoch. One epoch warms up, the next ones are timed.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path

import lightly
import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models import ResNetGenerator
from lightly.models.modules import heads
from lightly.models.utils import update_momentum
from lightly.transforms import SimCLRTransform
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

BATCH = 512
Loss = Callable[[Tensor, Tensor], Tensor]


def measure(pictures: Path, rows: list[str], epochs: float, small: bool) -> str:
    """Markdown: images/s of the loop, and the minutes that `epochs` epochs would take."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    workers = 0 if small else min(16, os.cpu_count() or 1)
    lines = [
        f"lightly {lightly.__version__}, torch {torch.__version__}, {name}, {workers} workers, batch {BATCH}",
        "",
        f"| lightly's | images/s | minutes for {epochs:.0f} epochs (extrapolated) |",
        "|---|---|---|",
    ]
    for row in rows:
        if row not in METHODS:
            lines.append(f"| {row} | missing: no loop of lightly's here | – |")
            continue
        rate = images_a_second(pictures, METHODS[row], device, workers, steps=2 if small else None)
        lines.append(f"| {row} | {rate:,.0f} | {epochs * 50_000 / rate / 60:.1f} |")
    return "\n".join(lines)


def images_a_second(
    pictures: Path, method: Callable[[], nn.Module], device: torch.device, workers: int, steps: int | None
) -> float:
    """Of the second epoch, or of `steps` steps after as many."""
    dataset = ImageFolder(str(pictures), transform=SimCLRTransform(input_size=32, gaussian_blur=0.0))
    batch = BATCH if steps is None else 32
    loader = DataLoader(dataset, batch, shuffle=True, drop_last=True, num_workers=workers)
    model = method().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06 * BATCH / 128, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        began, seen = time.perf_counter(), 0
        for number, ((first, second), _) in enumerate(loader):
            loss = model(first.to(device), second.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(first)
            if number + 1 == steps:
                break
        if device.type == "cuda":
            torch.cuda.synchronize()
    return seen / (time.perf_counter() - began)


def backbone() -> nn.Module:
    """lightly's ResNet-18 without its classifier."""
    children = list(ResNetGenerator("resnet-18").children())[:-1]
    return nn.Sequential(*children, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class TwoViews(nn.Module):
    """SimCLR and Barlow Twins: an encoder, a head and a loss of both views."""

    def __init__(self, head: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.encoder, self.head, self.loss = backbone(), head, loss

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.loss(self.head(self.encoder(first)), self.head(self.encoder(second)))


class BYOL(nn.Module):
    """Encoder, projector and predictor, and averages of the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(backbone(), heads.BYOLProjectionHead(512, 1024, 256))
        self.predictor = heads.BYOLPredictionHead(256, 1024, 256)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.loss = NegativeCosineSimilarity()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        update_momentum(self.student, self.teacher, m=0.99)
        predicted = [self.predictor(self.student(view)) for view in (first, second)]
        with torch.no_grad():
            targets = [self.teacher(view) for view in (first, second)]
        return 0.5 * (self.loss(predicted[0], targets[1]) + self.loss(predicted[1], targets[0]))


def _barlow_head() -> nn.Module:
    return heads.ProjectionHead([(512, 2048, nn.BatchNorm1d(2048), nn.ReLU(inplace=True)), (2048, 2048, None, None)])


METHODS: dict[str, Callable[[], nn.Module]] = {
    "simclr": lambda: TwoViews(heads.SimCLRProjectionHead(512, 512, 128), NTXentLoss()),
    "barlow_twins": lambda: TwoViews(_barlow_head(), BarlowTwinsLoss()),
    "byol": BYOL,
}
