"""Saving and resuming beside Accelerate's `save_state`, `load_state` and `skip_first_batches`.

    python tests/bench/checkpoint.py [WORK_FOLDER] [--model vit_base_patch16_224] [--rounds 5] [--depth 200]

One model (MAE around a timm ViT on 32x32 pictures in 64 patches, with AdamW's state), one dataset (noise pictures of
CIFAR's size, made in the work folder), one place in it. A save is timed as long as the loop waits for it, and until
it is on the disk; a resume from built but untrained objects until the first batch is there, files in the page cache.
Accelerate gets the pictures once as a map-style dataset, whose skipped batches it does not read, and once as an
iterable one, as streams of shards are. Rounds are interleaved; medians. Prints Markdown. On a GPU where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import platform
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from data.dataset import ShardedDataset
from data.shards import DatasetWriter
from pretrain.build import build_objective
from pretrain.checkpoint import Retention, newest
from pretrain.loop import take_step
from pretrain.optim import build_optimizer
from pretrain.recipe_file import parse_recipe
from pretrain.saver import Saver
from pretrain.setup import Setup, make_loader, prepare

PICTURES, BATCH = 20_000, 64


@dataclass
class Times:
    """Seconds, one a round, by what was timed."""

    found: dict[str, list[float]] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time the block; work that a GPU still has to do counts."""
        synchronise()
        began = time.perf_counter()
        yield
        synchronise()
        self.found.setdefault(name, []).append(time.perf_counter() - began)

    def median(self, name: str) -> float:
        """Of all rounds."""
        return median(self.found[name])


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Make the data, build both sides, time them in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, nargs="?", help="folder for data and checkpoints (default: a new one)")
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm's name of the ViT (small: 23M)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--depth", type=int, default=200, help="batches consumed before the checkpoint (default: 200)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        data = make_data(work / "pictures")
        setup = ours(data, work, arguments.model, arguments.depth)
        print(compare(setup, Peer(setup), work, arguments.rounds, arguments.depth))


def make_data(folder: Path) -> Path:
    """Noise pictures of 32x32, once."""
    if not (folder / "dataset.json").exists() and not folder.exists():
        noise = np.random.Generator(np.random.Philox(0))
        with DatasetWriter(folder, "images", 2000) as writer:
            for number in range(PICTURES):
                buffer = io.BytesIO()
                Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
                writer.add(f"{number:06d}", {"jpg": buffer.getvalue()}, 0)
    return folder


def ours(data: Path, work: Path, model: str, depth: int) -> Setup:
    """A run after two steps, so that the optimiser has state, said to be `depth` batches on."""
    tree: dict[str, Any] = {
        "name": "bench",
        "data": {"train": str(data), "canvas": 32, "workers": 0},
        "encoder": {"kind": "vision", "model": model, "image_size": 32, "model_args": {"patch_size": 4}},
        "objective": {"name": "mae", "decoder_width": 192, "decoder_depth": 2, "decoder_heads": 3},
        "train": {"batch_size": BATCH, "steps": 10_000},
    }
    setup = prepare(parse_recipe(tree, "the benchmark's recipe"), work)
    batches = iter(setup.loader)
    for _ in range(2):
        take_step(setup, batches)
    setup.state.step, setup.state.position = depth, depth * BATCH
    return setup


class Pictures(Dataset[Any]):
    """The same pictures for Accelerate, through the same reader, decoded by PIL."""

    def __init__(self, data: ShardedDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, place: int) -> Any:
        payload, label = self.data.image(place)
        return torch.from_numpy(np.array(Image.open(io.BytesIO(payload)).convert("RGB"))), label


class Stream(IterableDataset[Any]):
    """The same, one after the other."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __iter__(self) -> Iterator[Any]:
        return (self.pictures[place] for place in range(len(self.pictures)))


class Peer:
    """The same model and optimiser, prepared by Accelerate."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.accelerator = setup, Accelerator()
        self.pictures = Pictures(setup.data.train)
        self.build()
        batch = next(iter(make_loader(setup.recipe, setup.data, setup.accelerator))).to(self.accelerator.device)
        self.accelerator.backward(self.model(batch, 0.5).loss_sum)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def build(self) -> None:
        """Untrained objects, as a new process has them."""
        self.accelerator.free_memory()
        objective = build_objective(self.setup.recipe)
        optimizer = build_optimizer(objective.to(self.accelerator.device), self.setup.recipe.optimizer)
        self.model, self.optimizer = self.accelerator.prepare(objective, optimizer)

    def loader(self, stream: bool) -> Any:
        """A prepared loader at its start."""
        if stream:
            return self.accelerator.prepare(DataLoader(Stream(self.pictures), BATCH))
        return self.accelerator.prepare(DataLoader(self.pictures, BATCH, shuffle=True))


def compare(setup: Setup, peer: Peer, work: Path, rounds: int, depth: int) -> str:
    """The table."""
    times, theirs = Times(), work / "accelerate"
    step = steps(setup, times)
    for folder in (work / "checkpoints", theirs):
        shutil.rmtree(folder, ignore_errors=True)
    saver = Saver(work / "checkpoints", Retention(2))
    for number in range(rounds + 1):
        if number == 1:
            times.found.clear()  # the first round reserves memory; it is told apart
        with times.timed("ours, blocked"):
            saver.save(setup.state.step + number, setup.state.snapshot(setup.recipe, setup.data.facts))
        while saver._thread is not None and saver._thread.is_alive():
            step()
        assert saver.finish() is None
        times.found.setdefault("ours, until durable", []).append(saver.took)
        with times.timed("theirs, blocked"):
            peer.accelerator.save_state(str(theirs))
        if number == 0:
            first = times.found["ours, blocked"][0]
        host, pieces = saver._host, {kind: saver._mine(part) for kind, part in snapshot(setup).items()}
        with times.timed("copy"):
            for kind, file in host.items():
                file.copy(pieces[kind])
        resume(setup, peer, saver, theirs, depth, times)
    return report(setup, saver, theirs, times, rounds, depth, first)


def snapshot(setup: Setup) -> dict[str, Any]:
    return {k: v for k, v in setup.state.snapshot(setup.recipe, setup.data.facts).tensors.items() if v}


def steps(setup: Setup, times: Times) -> Callable[[], None]:
    """A training step on one batch; nothing is updated, so that what is saved stays what it was."""
    batch = next(iter(make_loader(setup.recipe, setup.data, setup.accelerator))).to(setup.accelerator.device)

    def step() -> None:
        setup.model(batch, 0.5).loss_sum.backward()
        for parameter in setup.state.objective.parameters():
            parameter.grad = None

    return step


def resume(setup: Setup, peer: Peer, saver: Saver, theirs: Path, depth: int, times: Times) -> None:
    """Both, from objects that hold something else."""
    with torch.no_grad():
        for parameter in setup.state.objective.parameters():
            parameter.zero_()
    setup.state.optimizer.state.clear()
    with times.timed("ours, resumed"):
        with times.timed("ours, verified"):
            path = newest(saver.folder, print)
        assert path is not None
        with times.timed("ours, restored"):
            setup.state.restore(path, setup.recipe, setup.data.facts)
        with times.timed("ours, first batch"):
            loader = make_loader(setup.recipe, setup.data, setup.accelerator)
            loader.position = setup.state.position
            next(iter(loader))
    assert setup.state.step == depth
    peer.build()
    with times.timed("theirs, restored"):
        peer.accelerator.load_state(str(theirs))
    for name, stream in (("map-style", False), ("iterable", True)):
        loader = peer.loader(stream)
        with times.timed(f"theirs, first batch, {name}"):
            next(iter(skip_first_batches(loader, depth)))
        peer.accelerator._dataloaders.clear()


def report(setup: Setup, saver: Saver, theirs: Path, times: Times, rounds: int, depth: int, first: float) -> str:
    """Markdown."""
    parameters = sum(p.numel() for p in setup.state.objective.parameters())
    assert saver.last is not None
    sizes = [sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in (saver.last, theirs)]
    m = times.median
    ours_resumed, load = m("ours, resumed"), m("theirs, restored")
    rows: list[tuple[str, str, str, str]] = [
        ("a save blocks the loop, ms", *against(m("ours, blocked"), m("theirs, blocked"), 1000)),
        ("of that the copy, ms", f"{1000 * m('copy'):.1f}", "", ""),
        ("the first save of a life, ms", f"{1000 * first:.1f}", "", ""),
        (
            "until it is on the disk (ours: forced, with checksums, while training goes on; theirs: not forced), s",
            *against(m("ours, until durable"), m("theirs, blocked"), 1),
        ),
        (
            "written, MB/s",
            f"{sizes[0] / 1e6 / m('ours, until durable'):.0f}",
            f"{sizes[1] / 1e6 / m('theirs, blocked'):.0f}",
            "",
        ),
        ("size, MB", f"{sizes[0] / 1e6:.1f}", f"{sizes[1] / 1e6:.1f}", f"{sizes[1] / sizes[0]:.2f}"),
        ("read state (ours: after checking), s", *against(m("ours, restored"), load, 1)),
        ("checking every byte, s", f"{m('ours, verified'):.3f}", "no check", ""),
    ]
    for name in ("map-style", "iterable"):
        skip = m(f"theirs, first batch, {name}")
        rows.append((f"first batch, {name}, s", *against(m("ours, first batch"), skip, 1)))
        rows.append((f"resume in all, {name}, s", *against(ours_resumed, load + skip, 1)))
    head = ("", "headwater", "accelerate", "ratio")
    lines = [head, ("---", "---:", "---:", "---:"), *rows]
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "accelerate", "safetensors", "timm"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} thread(s)"
    return (
        f"MAE around {setup.recipe.encoder.model}, {parameters / 1e6:.1f}M parameters with AdamW's state; batches of "  # type: ignore[union-attr]
        f"{BATCH} pictures of 32x32, {depth} consumed; medians of {rounds} interleaved rounds\n"
        f"{packages}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, {device}\n\n"
        + "\n".join("| " + " | ".join(line) + " |" for line in lines)
    )


def against(mine: float, other: float, unit: float) -> tuple[str, str, str]:
    """Both, and how many times as long the other took."""
    digits = 1 if unit == 1000 else 3
    return f"{mine * unit:.{digits}f}", f"{other * unit:.{digits}f}", f"{other / mine:.2f}"


if __name__ == "__main__":
    main()
