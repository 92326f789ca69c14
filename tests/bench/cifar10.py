"""CIFAR-10, ResNet-18 (3x3 stem, no pooling behind it): kNN and linear accuracy after 200 epochs, row by row.

    python tests/bench/cifar10.py WORK_FOLDER CIFAR10 [--rows simclr byol] [--seeds 0 1 2] [--minutes 9] [--lightly]

CIFAR10 holds the folders train and test. A call stops before its minutes are over and the next one goes on: by the
product's own `watch.max_time` and resume. Training sees the 50,000 training pictures without labels; the last epoch is
judged once on the test pictures by kNN (k = 200, temperature 0.1, bank of all training pictures) and by a logistic
regression on frozen features. Minutes are those of training, loading and evaluation included, probes not.
`--lightly` measures lightly's loop on the same device instead. `--small` is a rehearsal of minutes on a CPU, whose
figures mean nothing. The table at the end names what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import accelerate
import timm
import torch
from accelerate.state import AcceleratorState
from cifar10_probes import judge

from data.image_shards import shard_images
from pretrain.clock import process_age
from pretrain.loop import train
from pretrain.preemption import Preempted
from pretrain.recipe_file import load_recipe

STARTED = time.monotonic() - process_age(os.getpid())
PROBING = 75.0
"""Seconds kept for judging a finished run; a rehearsal takes a tenth."""
LAST = 45.0
"""Seconds below which no run is begun or gone on with; likewise."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe, and what lightly's benchmark page reports (batch 512, 200 epochs)."""

    recipe: str | None
    page: str
    """kNN accuracy and minutes on one A6000, the best epoch on the test set; a dash where the page has none."""


ROWS = {
    "simclr": Row("simclr_cifar10", ".848 / 87"),
    "moco": Row("moco_cifar10", ".847 / 112"),
    "byol": Row("byol_cifar10", ".868 / 108"),
    "barlow_twins": Row("barlow_twins_cifar10", ".819 / 153"),
    "vicreg": Row("vicreg_cifar10", "–"),
    "dino": Row("dino_cifar10", ".813 / 109"),
    "mae_vit": Row("mae_cifar10", "–"),
    "fastsiam": Row(None, ".788 / 147"),
    "swav": Row(None, ".842 / 89"),
}
SMALL = ["train.batch_size=64", "train.steps=24", "watch.evaluate_every=0", "watch.checkpoint_every=8"]
SMALL += ["data.workers=0"]


@dataclass
class Result:
    """What one finished run of one row showed."""

    row: str
    seed: int
    epochs: float
    knn: float
    linear: float
    minutes: float
    device: str
    settings: list[str]


def main(words: list[str] | None = None) -> None:
    """Take up the work where the last call left it, then print the table."""
    arguments = _arguments(words)
    work = arguments.work
    for side in ("train", "test"):
        if not (work / "shards" / side).exists():
            shard_images(arguments.cifar / side, work / "shards" / side)
    if arguments.lightly:
        from cifar10_lightly import measure

        print(measure(arguments.cifar / "train", arguments.rows, arguments.epochs, small=arguments.small))
        return
    for seed in arguments.seeds:
        for name in arguments.rows:
            if ROWS[name].recipe and not _path(work, name, seed).exists() and not run(name, seed, arguments):
                print(f"time is up in {name}, seed {seed}; the same command goes on\n")
                print(table(work, arguments))
                return
    print(table(work, arguments))


def run(name: str, seed: int, arguments: argparse.Namespace) -> bool:
    """Train and judge one row with one seed, or as much of it as there is time for; whether it is done."""
    work, limit = arguments.work, 60.0 * arguments.minutes
    folder, settings = work / "runs" / f"{name}-{seed}", overrides(name, seed, arguments)
    hurry = 0.1 if arguments.small else 1.0
    if _left(limit) < LAST * hurry:
        return False
    AcceleratorState._reset_state(reset_partial_state=True)
    recipe = load_recipe(str(ROWS[name].recipe), [f"data.train={work / 'shards' / 'train'}", *settings])
    began, done = time.monotonic(), True
    try:
        export = train(recipe, folder)
    except Preempted:
        done = False
    seconds = _add_seconds(folder, time.monotonic() - began)
    if not done or _left(limit) < PROBING * hurry:
        return False
    found = judge(export, work / "shards", samples=2000 if arguments.small else None)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    epochs = recipe.steps(50_000) * recipe.train.batch_size / 50_000
    told = [word for word in settings if "max_time" not in word]
    result = Result(name, seed, round(epochs, 2), *found, round(seconds / 60, 2), device, told)
    path = _path(work, name, seed)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=1))
    return True


def overrides(name: str, seed: int, arguments: argparse.Namespace) -> list[str]:
    """What the benchmark changes about a row's recipe."""
    settings = [f"seed={seed}", f"train.epochs={arguments.epochs}", "data.validation=null"]
    settings += [f"watch.max_time={60 * arguments.minutes}", "watch.checkpoint_every=1000"]
    if torch.cuda.is_available():
        settings += ["train.precision=bf16", "data.resident=true"]
    if arguments.small:
        settings += SMALL
        if name != "mae_vit":
            settings += ["encoder.model_args.channels=[8, 8, 16, 16]"]
    return settings + arguments.set


def table(work: Path, arguments: argparse.Namespace) -> str:
    """Markdown: mean and range over seeds of what is done, and what is not."""
    lines = [
        f"torch {torch.__version__}, timm {timm.__version__}, accelerate {accelerate.__version__}; "
        f"{'SMALL REHEARSAL, figures mean nothing; ' if arguments.small else ''}ours: last epoch",
        "",
        "| row | seeds | epochs | kNN | linear | minutes | device | lightly's page: kNN / minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    missing = []
    for name, row in ROWS.items():
        paths = sorted((work / "results").glob(f"{name}-[0-9]*.json"))
        results = [Result(**json.loads(path.read_text())) for path in paths]
        absent = sorted(set(arguments.seeds) - {result.seed for result in results})
        if row.recipe is None:
            missing.append(f"{name} (no such objective here)")
        elif absent:
            missing.append(f"{name} (seeds {', '.join(map(str, absent))})")
        seeds = " ".join(str(result.seed) for result in results) or "–"
        cells = [_mean([getattr(r, field) for r in results], digits) for field, digits in _COLUMNS]
        device = ", ".join(sorted({result.device for result in results})) or "–"
        lines.append(f"| {name} | {seeds} | {' | '.join(cells)} | {device} | {row.page} |")
    return "\n".join([*lines, "", f"Missing: {', '.join(missing) or 'nothing'}."])


_COLUMNS = (("epochs", 0), ("knn", 3), ("linear", 3), ("minutes", 1))


def _mean(values: list[float], digits: int) -> str:
    if not values:
        return "missing"
    spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(set(values)) > 1 else ""
    return f"{sum(values) / len(values):.{digits}f}{spread}"


def _left(limit: float) -> float:
    return limit - (time.monotonic() - STARTED)


def _add_seconds(folder: Path, seconds: float) -> float:
    """Seconds spent on a run by all calls so far."""
    path = folder.with_suffix(".seconds")
    total = seconds + (float(path.read_text()) if path.exists() else 0.0)
    path.write_text(f"{total:.1f}")
    return total


def _path(work: Path, name: str, seed: int) -> Path:
    return work / "results" / f"{name}-{seed}.json"


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for shards, runs and results")
    parser.add_argument("cifar", type=Path, help="folder with train and test, each a folder a class")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=200)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call, start to end (default: 9)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to every row's recipe")
    parser.add_argument("--lightly", action="store_true", help="time lightly's loop instead")
    parser.add_argument("--small", action="store_true", help="a rehearsal with narrow networks and few steps")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
