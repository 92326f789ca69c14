"""Augmentation: images a second against lightly's, LightlyTrain's and kornia's transforms, on the same cores.

    python tests/bench/views.py [--seconds 1.0] [--rounds 5] [--processes 2] [--cifar FOLDER_OF_PICTURES]

Three cases: SimCLR's two views of 224 pixels and DINO's 2 x 224 + 6 x 96 from 500 x 375 JPEGs (cut out of
scikit-learn's two photographs, quality 90), and SimCLR's two views of 32 from 32 x 32 JPEGs (CIFAR-10 where
`--cifar` names a folder, else cut out of the same photographs). Each with pictures that are already decoded, and
from files. Every contender runs in `--processes` processes of one thread each at the same time, in turns, and the
medians of the rounds are compared. What a transform returns is counted as done: lightly's and LightlyTrain's
single views are not collated into a batch, ours and kornia's are batches.

The transforms are each library's own with the same crop scales, probabilities and strengths. They differ in this:
lightly resizes with Pillow and blurs with Pillow's box approximation; LightlyTrain resizes with OpenCV
(INTER_AREA); kornia cuts without antialiasing, and reads files with torchvision; ours jitters in a fixed order.
Compiling ours (some seconds, once on a machine) happens before anything is timed.

Needs: pip install 'headwater[bench]'. A library that is missing is left out, and the table says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.batch import ImageBatch
from data.canvas import CanvasDecoder
from data.keyed import sample_keys
from pretrain.encoders.vision import VisionConfig
from pretrain.views import BlurConfig, JitterConfig, ViewConfig, ViewsConfig, make_views

PICTURES = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RIVALS = {"lightly": "lightly", "LightlyTrain": "lightly-train", "kornia": "kornia"}
Batch = Callable[[int], Any]
"""Makes the views of a batch of pictures from number n on."""


@dataclass
class Case:
    """Pictures and what is made of them."""

    name: str
    height: int
    width: int
    batch: int
    goals: dict[str, float]
    """Wanted ratio from decoded pictures, by rival."""


CASES = [
    Case("SimCLR 2x224", 375, 500, 16, {"lightly": 5.0, "LightlyTrain": 2.5}),
    Case("DINO 2x224 + 6x96", 375, 500, 16, {"lightly": 5.0, "LightlyTrain": 2.5}),
    Case("SimCLR 2x32", 32, 32, 256, {"lightly": 10.0}),
]


# What each library is asked for.


def our_views(case: Case) -> tuple[ViewsConfig, VisionConfig]:
    """The same as SimCLRTransform and DINOTransform of lightly."""
    if case.name.startswith("DINO"):
        jitter = JitterConfig(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        views = [
            ViewConfig(scale=(0.4, 1.0), jitter=jitter, blur=BlurConfig(probability=1.0)),
            ViewConfig(scale=(0.4, 1.0), jitter=jitter, blur=BlurConfig(probability=0.1), solarize=0.2),
            ViewConfig(count=6, size=96, scale=(0.05, 0.4), jitter=jitter),
        ]
        return ViewsConfig(views=views), VisionConfig(image_size=224, interpolation="bicubic")
    if case.width == 32:
        jitter = JitterConfig(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
        views = [ViewConfig(count=2, jitter=jitter, blur=None)]
        return ViewsConfig(views=views), VisionConfig(image_size=32, interpolation="bilinear")
    return ViewsConfig(), VisionConfig(image_size=224, interpolation="bilinear")


def ours(case: Case, paths: list[Path], decoded: bool) -> Batch:
    """Canvases as the loader gives them, then all views of a batch at once."""
    config, vision = our_views(case)
    decode, keys = CanvasDecoder(max(case.height, case.width)), torch.from_numpy(sample_keys(0, 0, np.arange(1 << 20)))

    def read(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = [paths[(start + n) % len(paths)].read_bytes() for n in range(case.batch)]
        return decode(chosen, keys[: case.batch])

    kept = {start: read(start) for start in range(0, len(paths), case.batch)} if decoded else {}

    def make(start: int) -> Any:
        images, sizes = kept[start % len(paths)] if decoded else read(start)
        some = keys[start : start + case.batch]
        return make_views(ImageBatch(images=images, sizes=sizes, labels=some, keys=some, ids=some), config, vision)

    return make


def lightly(case: Case, paths: list[Path], decoded: bool) -> Batch:
    """lightly's transforms of Pillow images."""
    from lightly.transforms import DINOTransform, SimCLRTransform

    small = {"input_size": 32, "cj_strength": 0.5, "gaussian_blur": 0.0} if case.width == 32 else {}
    transform = DINOTransform() if case.name.startswith("DINO") else SimCLRTransform(**small)
    return one_by_one(case, paths, decoded, lambda path: Image.open(path).convert("RGB"), transform)


def lightly_train(case: Case, paths: list[Path], decoded: bool) -> Batch:
    """LightlyTrain's transforms of arrays, with its own reader of files."""
    import cv2
    from lightly_train._data.file_helpers import ImageMode, open_image_numpy
    from lightly_train._methods.dino.dino_transform import (
        DINOLocalViewRandomResizedCropArgs,
        DINOLocalViewTransformArgs,
        DINORandomResizedCropArgs,
        DINOTransform,
        DINOTransformArgs,
    )
    from lightly_train._methods.simclr.simclr_transform import (
        SimCLRColorJitterArgs,
        SimCLRTransform,
        SimCLRTransformArgs,
    )

    cv2.setNumThreads(1)
    if case.name.startswith("DINO"):
        local = DINOLocalViewRandomResizedCropArgs(min_scale=0.05, max_scale=0.4)
        whole = DINORandomResizedCropArgs(min_scale=0.4)
        arguments = DINOTransformArgs(random_resize=whole, local_view=DINOLocalViewTransformArgs(random_resize=local))
        transform: Any = DINOTransform(arguments)
    elif case.width == 32:
        jitter = SimCLRColorJitterArgs(strength=0.5)
        transform = SimCLRTransform(SimCLRTransformArgs(image_size=(32, 32), color_jitter=jitter, gaussian_blur=None))
    else:
        transform = SimCLRTransform(SimCLRTransformArgs())
    return one_by_one(
        case, paths, decoded, lambda path: open_image_numpy(path, ImageMode.RGB), lambda i: transform({"image": i})
    )


def kornia(case: Case, paths: list[Path], decoded: bool) -> Batch:
    """kornia's modules on float batches, each sample with its own parameters."""
    import kornia.augmentation as K
    from torchvision.io import decode_image

    def view(side: int, scale: tuple[float, float], strength: float, blur: float, solarize: float = 0.0) -> Any:
        saturation = 0.4 if case.name.startswith("DINO") else 0.8
        factors = (0.8 * strength, 0.8 * strength, saturation * strength, 0.2 * strength)
        return torch.nn.Sequential(
            K.RandomResizedCrop((side, side), scale=scale),
            K.RandomHorizontalFlip(),
            K.ColorJitter(*factors, p=0.8),
            K.RandomGrayscale(p=0.2),
            *([K.RandomGaussianBlur((17, 17), (0.1, 2.0), p=blur)] if blur else []),
            *([K.RandomSolarize(0.0, 0.0, p=solarize)] if solarize else []),
            K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        )

    if case.name.startswith("DINO"):
        views = [view(224, (0.4, 1.0), 0.5, 1.0), view(224, (0.4, 1.0), 0.5, 0.1, 0.2)]
        views += [view(96, (0.05, 0.4), 0.5, 0.5)] * 6
    else:
        views = [view(32, (0.08, 1.0), 0.5, 0.0) if case.width == 32 else view(224, (0.08, 1.0), 1.0, 0.5)] * 2

    def read(start: int) -> torch.Tensor:
        return torch.stack([decode_image(str(paths[(start + n) % len(paths)])) for n in range(case.batch)])

    kept = {start: read(start) for start in range(0, len(paths), case.batch)} if decoded else {}

    def make(start: int) -> Any:
        images = (kept[start % len(paths)] if decoded else read(start)).float() / 255
        return [transform(images) for transform in views]

    return make


def one_by_one(
    case: Case, paths: list[Path], decoded: bool, read: Callable[[Path], Any], transform: Callable[[Any], Any]
) -> Batch:
    """A batch of a library that transforms single pictures."""
    kept = [read(path) for path in paths] if decoded else []

    def make(start: int) -> Any:
        numbers = [(start + n) % len(paths) for n in range(case.batch)]
        return [transform(kept[n] if decoded else read(paths[n])) for n in numbers]

    return make


MAKERS = {"headwater": ours, "lightly": lightly, "LightlyTrain": lightly_train, "kornia": kornia}


# How they are measured.


def work(connection: Any, barrier: Any, folder: Path) -> None:
    """One process: obeys (case, contender, decoded, seconds) and answers with images a second."""
    torch.set_num_threads(1)

    made: dict[tuple[str, str, bool], Batch] = {}
    while (order := connection.recv()) is not None:
        number, name, decoded, seconds = order
        case = CASES[number]
        key = (case.name, name, decoded)
        try:
            if key not in made:
                made[key] = MAKERS[name](case, sorted((folder / case.name).iterdir()), decoded)
                for start in range(0, PICTURES, case.batch):  # whatever compiles does it now
                    made[key](start)
            answer: Any = None
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        barrier.wait()
        if answer is None:
            began, done = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                made[key](done)
                done += case.batch
            answer = done / (time.perf_counter() - began)
        connection.send(answer)


def write_pictures(folder: Path, cifar: Path | None) -> None:
    """The JPEG files of each case."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    generator = np.random.default_rng(0)
    found = sorted(cifar.rglob("*.*"))[:PICTURES] if cifar else []
    for case in CASES:
        (folder / case.name).mkdir()
        for number in range(PICTURES if case.batch > 64 else 64):
            path = folder / case.name / f"{number:03}.jpg"
            if case.width == 32 and found:
                path.write_bytes(found[number].read_bytes())
                continue
            photograph = photographs[number % len(photographs)]
            top, left = (
                generator.integers(0, have - want + 1)
                for have, want in zip(photograph.shape, (case.height, case.width), strict=False)
            )
            cut = photograph[top : top + case.height, left : left + case.width]
            cut = cut[:, ::-1] if number % 4 > 1 else cut
            buffer = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(cut)).save(buffer, "JPEG", quality=90)
            path.write_bytes(buffer.getvalue())


def measure(arguments: argparse.Namespace, folder: Path) -> dict[tuple[int, str, bool], list[float] | str]:
    """Images a second over all processes, by case, contender and whether pictures were decoded before."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(arguments.processes)
    pipes, processes = [], []
    for _ in range(arguments.processes):
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, barrier, folder), daemon=True)
        process.start()
        pipes.append(here)
        processes.append(process)
    found: dict[tuple[int, str, bool], Any] = {}
    for round_number in range(arguments.rounds + 1):  # round 0 warms up
        for number in range(len(CASES)):
            for decoded in (True, False):
                for name in MAKERS:
                    if isinstance(found.get((number, name, decoded)), str):
                        continue
                    for pipe in pipes:
                        pipe.send((number, name, decoded, arguments.seconds if round_number else 0.0))
                    answers = [pipe.recv() for pipe in pipes]
                    if isinstance(answers[0], str):
                        found[number, name, decoded] = answers[0]
                    elif round_number:
                        found.setdefault((number, name, decoded), []).append(sum(answers))
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join()
    return found


def report(found: dict[tuple[int, str, bool], list[float] | str]) -> str:
    """Two Markdown tables: rates and ratios, and the goals."""
    lines = ["| case | from | headwater | " + " | ".join(RIVALS) + " |", "|---|---|---|" + "---|" * len(RIVALS)]
    verdicts = []
    for number, case in enumerate(CASES):
        for decoded in (True, False):
            ours_found = found[number, "headwater", decoded]
            if isinstance(ours_found, str):
                raise SystemExit(f"ours failed: {ours_found}")
            mine = statistics.median(ours_found)
            cells = [f"{mine:,.0f}"]
            for rival in RIVALS:
                theirs = found[number, rival, decoded]
                if isinstance(theirs, str):
                    cells.append("missing")
                    verdicts.append(f"- {case.name}: {rival} could not run here ({theirs.splitlines()[0]})")
                    continue
                ratio = mine / statistics.median(theirs)
                cells.append(f"{statistics.median(theirs):,.0f} ({ratio:.1f}x)")
                goal = case.goals.get(rival, 1.0) if decoded else 1.0
                word = "reached" if ratio >= goal else "MISSED"
                verdicts.append(
                    f"- {case.name} from {'decoded pictures' if decoded else 'files'}: "
                    f"{ratio:.1f}x {rival}, goal {goal:g}x {word}"
                )
            lines.append(f"| {case.name} | {'decoded' if decoded else 'JPEG files'} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *verdicts])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of each contender in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cifar", type=Path, help="folder of 32 x 32 pictures")
    arguments = parser.parse_args()
    # Before the processes start: libraries look once.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    versions = [f"torch {torch.__version__}"]
    for name, package in RIVALS.items():
        try:
            versions.append(f"{name} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} missing (pip install {package})")
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), arguments.cifar)
        found = measure(arguments, Path(folder))
    how = (
        f"{arguments.processes} processes of one thread, {arguments.rounds} rounds of {arguments.seconds:g} s in turns"
    )
    print(f"images/s, medians; {how}; batches of 16, 256 at 32 pixels")
    print(f"{', '.join(versions)}\n")
    print(report(found))


if __name__ == "__main__":
    main()
