"""Whole training steps against lightly and transformers: the same network, batch and precision, in turns.

    python tests/bench/step.py [--rounds 5] [--steps 4] [--workers 2] [--threads 2] [--batch 128]

Two cases, each with the same 32 x 32 JPEGs (cut out of scikit-learn's two photographs):

- **MAE**: the ViT of `mae_cifar10`: 6 blocks, width 128, patches of 4, with a decoder of 2 blocks, width 64; AdamW.
  Rivals: lightly's MAE modules in the loop of lightly's example, and transformers' `ViTMAEForPreTraining`.
- **SimCLR**: torchvision's ResNet-18 layout without its classifier, projection 512-512-128, NT-Xent over the batch,
  SGD. Rival: lightly's modules, loss and transform in the loop of lightly's example.

Two measures: *step*, from views that were made before, and *end to end*, from files to the optimiser's step, with the
same number of loader workers (ours makes its views within the step, the rivals in the workers). Before each timed turn
a contender's loader is drained of what it prepared while the others had their turn. Every contender is timed `--steps`
steps a turn, in turns, and the medians of the rounds are compared.

Ours is the step of a run (`pretrain.loop.take_step`): seeded, checked for numbers that are not finite, with the
gradient's norm measured. The rivals' loops do none of that.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data.image_shards import shard_images
from pretrain.loop import take_step
from pretrain.recipe_file import parse_recipe
from pretrain.setup import prepare

WIDTH, DEPTH, HEADS, PATCH, SIDE = 128, 6, 4, 4, 32
DECODER_WIDTH, DECODER_DEPTH, DECODER_HEADS = 64, 2, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DRAINED = 6
"""Batches thrown away before a timed turn from files: more than the loaders hold ready (two a worker)."""
Step = Callable[[], Any]


@dataclass
class Contender:
    """One library's training loop."""

    name: str
    step: Step
    """One optimiser step from pictures that are at hand."""
    whole: Step
    """One optimiser step, files included."""


# Ours.


def ours(case: str, shards: Path, work: Path, arguments: argparse.Namespace) -> Contender:
    """The step of a run, with a recipe."""
    tree: dict[str, Any] = {
        "name": "step",
        "data": {"train": str(shards), "canvas": SIDE, "workers": arguments.workers},
        "train": {"batch_size": arguments.batch, "steps": 100_000, "clip": None},
    }
    if case == "MAE":
        size = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
        tree["encoder"] = {"kind": "vision", "model": "vit_tiny_patch16_224", "image_size": SIDE, "model_args": size}
        decoder = {"decoder_width": DECODER_WIDTH, "decoder_depth": DECODER_DEPTH, "decoder_heads": DECODER_HEADS}
        tree["objective"] = {"name": "mae", **decoder}
    else:
        tree["encoder"] = {"kind": "vision", "model": "resnet18", "image_size": SIDE, "interpolation": "bilinear"}
        jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
        views = [{"count": 2, "jitter": jitter, "blur": None}]
        tree["objective"] = {"name": "simclr", "temperature": 0.5, "hidden_width": 512, "views": views}
        tree["optimizer"] = {"name": "sgd", "lr": 0.06, "momentum": 0.0, "weight_decay": 0.0}
    setup = prepare(parse_recipe(tree, "the benchmark's recipe"), work)
    setup.state.objective.train()
    streamed = iter(setup.loader)
    batches = [next(streamed) for _ in range(4)]
    ready = endless(batches)
    make: Any = setup.state.objective.view
    made = {batch.images.data_ptr(): make(batch) for batch in batches}
    # A batch that is at hand gets its views from there, a streamed one has them made.
    setup.state.objective.view = lambda batch: view_of(made, make, batch)  # type: ignore
    return Contender("headwater", lambda: take_step(setup, ready), lambda: take_step(setup, streamed))


def view_of(made: dict[int, Any], make: Any, batch: Any) -> Any:
    """The views of a batch, made anew unless they are at hand."""
    found = made.get(batch.images.data_ptr())
    return make(batch) if found is None else found


# lightly and transformers.


class LightlyMAE(nn.Module):
    """lightly's MAE modules, put together as in its example."""

    def __init__(self) -> None:
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        vit = VisionTransformer(SIDE, PATCH, num_classes=0, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=PATCH,
            embed_dim=WIDTH,
            decoder_embed_dim=DECODER_WIDTH,
            decoder_depth=DECODER_DEPTH,
            decoder_num_heads=DECODER_HEADS,
        )

    def forward(self, images: Tensor) -> Tensor:
        """The mean squared error of hidden patches."""
        from lightly.models import utils

        size = (len(images), self.backbone.sequence_length)
        keep, hidden = utils.random_token_mask(size=size, mask_ratio=0.75, device=images.device)
        embedded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.set_at_index(utils.repeat_token(self.decoder.mask_token, size), keep, embedded)
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), hidden))
        target = utils.get_at_index(utils.patchify(images, PATCH), hidden - 1)  # tokens count the class token
        return nn.functional.mse_loss(predicted, target)


class TransformersMAE(nn.Module):
    """transformers' model of the same size."""

    def __init__(self) -> None:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        super().__init__()
        config = ViTMAEConfig(
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            image_size=SIDE,
            patch_size=PATCH,
            decoder_hidden_size=DECODER_WIDTH,
            decoder_num_hidden_layers=DECODER_DEPTH,
            decoder_num_attention_heads=DECODER_HEADS,
            decoder_intermediate_size=4 * DECODER_WIDTH,
            norm_pix_loss=True,
        )
        self.model = ViTMAEForPreTraining(config)

    def forward(self, images: Tensor) -> Tensor:
        """The model's own loss."""
        return self.model(pixel_values=images).loss


class LightlySimCLR(nn.Module):
    """Backbone, head and loss of lightly's example; the views are passed through one after the other, as there."""

    def __init__(self) -> None:
        import torchvision
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead

        super().__init__()
        self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
        self.head, self.criterion = SimCLRProjectionHead(512, 512, 128), NTXentLoss()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """NT-Xent of the two views."""
        projected = [self.head(self.backbone(view).flatten(start_dim=1)) for view in (first, second)]
        return self.criterion(*projected)


def theirs(name: str, model: nn.Module, transform: Any, pictures: Path, arguments: argparse.Namespace) -> Contender:
    """A plain PyTorch loop, as in lightly's examples: ImageFolder, DataLoader, zero_grad, backward, step."""
    from torchvision.datasets import ImageFolder

    sgd = isinstance(model, LightlySimCLR)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.SGD(parameters, lr=0.06) if sgd else torch.optim.AdamW(parameters, lr=1.5e-4)
    loader = DataLoader(
        ImageFolder(pictures, transform),
        batch_size=arguments.batch,
        shuffle=True,
        drop_last=True,
        num_workers=arguments.workers,
        persistent_workers=arguments.workers > 0,
    )

    def epochs() -> Iterator[Any]:
        while True:
            for views, _ in loader:
                yield views if isinstance(views, list | tuple) else [views]

    def train(views: list[Tensor]) -> None:
        loss = model(*views)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    streamed = epochs()
    ready = endless([next(streamed) for _ in range(4)])
    return Contender(name, lambda: train(next(ready)), lambda: train(next(streamed)))


def mae_rivals(pictures: Path, arguments: argparse.Namespace) -> list[Contender]:
    """lightly's transform for its modules; torchvision's, as in the script of transformers, for transformers."""
    from lightly.transforms import MAETransform
    from torchvision import transforms as T

    resized = T.RandomResizedCrop(SIDE, scale=(0.2, 1.0), interpolation=T.InterpolationMode.BICUBIC)
    plain = T.Compose([resized, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])
    return [
        theirs("lightly", LightlyMAE(), MAETransform(input_size=SIDE), pictures, arguments),
        theirs("transformers", TransformersMAE(), plain, pictures, arguments),
    ]


def simclr_rivals(pictures: Path, arguments: argparse.Namespace) -> list[Contender]:
    """lightly's example."""
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=SIDE, cj_strength=0.5, gaussian_blur=0.0)
    return [theirs("lightly", LightlySimCLR(), transform, pictures, arguments)]


# How they are measured.


def endless(batches: list[Any]) -> Iterator[Any]:
    """The same batches, over and over."""
    while True:
        yield from batches


def write_pictures(folder: Path, count: int) -> None:
    """JPEGs of 32 x 32 in two classes."""
    from sklearn.datasets import load_sample_images

    photographs, generator = load_sample_images().images, np.random.default_rng(0)
    for number in range(count):
        photograph = photographs[number % 2]
        top, left = (int(generator.integers(0, side - SIDE)) for side in photograph.shape[:2])
        buffer = io.BytesIO()
        Image.fromarray(photograph[top : top + SIDE, left : left + SIDE]).save(buffer, "JPEG", quality=90)
        path = folder / f"photograph_{number % 2}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())


def measure(contenders: list[Contender], measured: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step of each contender, one number a round; the first round only warms up."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(arguments.rounds + 1):
        for contender in contenders:
            step = contender.step if measured == "step" else contender.whole
            for _ in range(DRAINED if measured != "step" else 1):
                step()
            began = time.perf_counter()
            for _ in range(arguments.steps):
                step()
            if turn:
                seconds[contender.name].append((time.perf_counter() - began) / arguments.steps)
    return seconds


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(arguments.threads)
    import lightly
    import transformers

    print(
        f"milliseconds a step (samples/s), medians of {arguments.rounds} turns of {arguments.steps} steps; batch ",
        end="",
    )
    print(f"{arguments.batch}, float32, CPU, {arguments.threads} threads, {arguments.workers} loader workers")
    versions = {"torch": torch.__version__, "lightly": lightly.__version__, "transformers": transformers.__version__}
    print(", ".join(f"{name} {version}" for name, version in versions.items()) + "\n")
    print("| case | measured | headwater | lightly | transformers |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder / "pictures", 16 * arguments.batch)
        shard_images(folder / "pictures", folder / "shards")
        for case, rivals in (("MAE", mae_rivals), ("SimCLR", simclr_rivals)):
            contenders = [ours(case, folder / "shards", folder / case, arguments)]
            contenders += rivals(folder / "pictures", arguments)
            for measured in ("step", "end to end"):
                print(row(case, measured, measure(contenders, measured, arguments), arguments.batch), flush=True)


def row(case: str, measured: str, seconds: dict[str, list[float]], batch: int) -> str:
    """One line of the table; behind each rival its time over ours."""
    mine = statistics.median(seconds["headwater"])
    cells = []
    for name in ("headwater", "lightly", "transformers"):
        if name not in seconds:
            cells.append("")
            continue
        median = statistics.median(seconds[name])
        ratio = "" if name == "headwater" else f", **{median / mine:.2f}x** ours"
        cells.append(f"{1e3 * median:,.0f} ({batch / median:,.0f}/s){ratio}")
    return f"| {case} | {measured} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
