"""What combining gives over its single members: ensembles, soups, WiSE-FT, multi-task training, adaptation.

    python tests/bench/combining.py IMAGE_SHARDS TEXT_FOLDER WORK_FOLDER [STAGE …] [--images EXPORT] [--text EXPORT]
                                    [--draws 3] [--steps 150] [--items 2000]

IMAGE_SHARDS holds shards of CIFAR-10 in `train` and `test`, TEXT_FOLDER holds `general`, `reviews` and `sst2`. Without
exports small encoders are pre-trained first (`mae_cifar10` for 600 steps, `mlm_small` on general alone for 400).
Stages, all of them by default: `images`, `text` (members, ensemble, soups and, for pictures, the robustness curve),
`multitask_images`, `multitask_text`, `adapt_images` (to pictures of low contrast), `adapt_text` (general to reviews).

Members differ in seed and learning rate; members, weights and alpha are chosen on validation data that neither trains
nor judges. Each draw has labels of its own. Finished draws are kept in WORK_FOLDER/results.json, so the command can
be stopped and given again. Prints a Markdown table: points of accuracy over the single member named, every draw, the
mean, and how many draws were won, level and lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.corruptions import corrupt
from data.dataset import ShardedDataset
from data.keyed import hash64
from data.shards import DatasetWriter
from data.text import shard_text
from finetune.adapt import Plan, Target, adapt
from finetune.encoder import load_encoder
from finetune.ensemble import ensemble
from finetune.interpolate import interpolate
from finetune.multitask import multitask
from finetune.run import finetune
from finetune.soup import soup
from finetune.splits import subset
from finetune.tasks import load_task
from pretrain.loop import train
from pretrain.recipe_file import load_recipe

RATES = (5e-4, 1e-3, 2e-3, 1e-3)
"""Of the members."""
VEHICLES = ("airplane", "automobile", "ship", "truck")
LABELS = 50
"""A class and draw."""
Found = dict[str, float]


class Bench:
    """Data and exports, made once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.shards, self.text, self.work = options.shards, options.text, options.work
        self.exports, self.options = {"images": options.images, "text": options.text_export}, options
        self.settings: dict[str, Any] = {"min_steps": options.steps, "epochs": 0.01, "lr": 1e-3}

    def pictures(self, name: str, source: str, first: int, count: int, two: bool = False) -> Path:
        """`count` pictures of the `source` shards in a hashed order, from the `first`; `two`: animal or vehicle."""
        out = self.work / "data" / name
        if not out.exists():
            dataset = ShardedDataset(self.shards / source, context=1)
            ids, labels = dataset.all_ids(), dataset.labels()
            order = np.argsort(hash64(7, np.arange(len(ids))), kind="stable")[first : first + count]
            with DatasetWriter(out, "images", 1000) as writer:
                vehicle = np.array([each in VEHICLES for each in dataset.classes]).astype(int)
                writer.extra = {"classes": ["animal", "vehicle"] if two else dataset.classes}
                for place in order.tolist():
                    payload, label = dataset.image(int(ids[place]))[0], int(labels[place])
                    writer.add(f"{place:06d}", {"jpg": payload}, int(vehicle[label]) if two else label)
        return out

    def sources(self) -> tuple[Path, Path]:
        """Texts labelled by whether they are paragraphs of `general` or of `reviews`: training and test."""
        out = self.work / "data" / "source_train.tsv", self.work / "data" / "source_test.tsv"
        if not out[1].exists():
            out[0].parent.mkdir(parents=True, exist_ok=True)
            rows = []
            for name in ("general", "reviews"):
                files = sorted(path for path in (self.text / name).rglob("*") if path.is_file())
                lines = [line for path in files[:50] for line in path.read_text(errors="replace").splitlines()]
                pieces = [" ".join(line.split())[:200] for line in lines if len(line.split()) >= 12]
                rows += [f"{piece}\t{name}" for piece in dict.fromkeys(pieces)][:4000]
            order = np.argsort(hash64(3, np.arange(len(rows))), kind="stable")
            for path, part in ((out[0], order[1000:]), (out[1], order[:1000])):
                path.write_text("".join(rows[place] + "\n" for place in part))
        return out

    def tokens(self, name: str) -> Path:
        """Shards of `general` or `reviews`, both in the given export's tokens, or else in general's."""
        out = self.work / "shards" / name
        if not out.exists():
            given = self.options.text_export
            with_tokens: dict[str, Any] = {"tokenizer": given} if given else {"vocab_size": 4096}
            if name != "general":
                with_tokens = {"tokenizer": self.tokens("general")}
            shard_text([self.text / name], out, progress=False, validation=0.02, **with_tokens)
        return out

    def export(self, kind: str) -> Path:
        """An encoder: the given one, or one of a short run."""
        if self.exports[kind] is None:
            recipe, settings = "mae_cifar10", [f"data.train={self.shards / 'train'}", "train.steps=600"]
            if kind == "text":
                recipe, settings = "mlm_small", [f"data.train={self.tokens('general')}", "train.steps=400"]
            chosen = load_recipe(recipe, [*settings, "watch.evaluate_every=0"])
            self.exports[kind] = train(chosen, self.work / f"pretrained_{kind}")
        found: Path = self.exports[kind]
        return found


def images(bench: Bench, draw: int) -> Found:
    """Members, soups, ensemble and WiSE-FT on CIFAR-10 and on a noisy copy of the test pictures."""
    items = bench.options.items
    data = bench.pictures("train", "train", 0, 20_000), bench.pictures("test", "test", 0, items)
    valid, noisy = bench.pictures("validation", "train", 20_000, items // 2), bench.work / "data/noisy"
    if not noisy.exists():
        corrupt(data[1], noisy, "noise", 3)
    return _members(bench, draw, "images", data, valid, [noisy])


def text(bench: Bench, draw: int) -> Found:
    """The same on SST-2, without a shifted set."""
    sst2 = bench.text / "sst2"
    return _members(bench, draw, "text", (sst2 / "train.tsv", sst2 / "test.tsv"), sst2 / "dev.tsv", [])


def _members(bench: Bench, draw: int, kind: str, data: tuple[Path, Path], valid: Path, shifted: list[Path]) -> Found:
    folder = bench.work / "members"
    shutil.rmtree(folder, ignore_errors=True)
    task = load_task(*data, load_encoder(bench.export(kind)))
    labels = task.train.select(subset(task.train.labels, LABELS, draw))  # the same for every member of a draw
    task = dataclasses.replace(task, train=labels)
    finetune(bench.export(kind), task, strategy="linear", seeds=[draw], output=folder / "probe")
    members = []
    for number, rate in enumerate(RATES):
        members.append(folder / f"member{number}")
        settings = bench.settings | {"lr": rate}
        finetune(bench.export(kind), task, strategy="full", seeds=[10 * draw + number], output=members[-1], **settings)
    found: Found = {}
    for each in soup(members, valid, data[1])["test"]["models"]:
        for other in each.get("leads", []):
            found[f"{kind}: {each['name']} over the best member on validation data"] = other["difference"]
    weighed = ensemble([folder / "probe", *members], data[1], validation=valid)["test"]["models"][-1]
    best = max(other["difference"] for other in weighed["leads"])
    worst = min(other["difference"] for other in weighed["leads"])
    found[f"{kind}: ensemble with probe, weighted, over its weakest member on test"] = best
    found[f"{kind}: ensemble with probe, weighted, over its strongest member on test"] = worst
    # Its head begins as a probe's, as the paper's begins as the zero-shot one.
    tuned = folder / "tuned"
    finetune(bench.export(kind), task, strategy="lp-ft", seeds=[draw], output=tuned, **bench.settings)
    between = interpolate(folder / "probe", tuned, data[1], shifted=shifted, validation=valid, steps=6)
    for name, entry in between["leads"].items():
        for end, other in zip(("probe", "fine-tuned model"), entry["leads"], strict=True):
            found[f"{kind}: WiSE-FT (alpha on validation data) over the {end}, {name}"] = other["difference"]
    return found


def multitask_images(bench: Bench, draw: int) -> Found:
    """The ten classes, and animal or vehicle on other pictures."""
    items = bench.options.items
    tasks = {
        "ten classes": ("train", "test", False),
        "animal or vehicle": ("train_two", "test_two", True),
    }
    data = {
        name: (
            bench.pictures(train, "train", 30_000 * two, 4000, two),
            bench.pictures(test, "test", 0, items, two),
        )
        for name, (train, test, two) in tasks.items()
    }
    return _multitask(bench, draw, "images", data)


def multitask_text(bench: Bench, draw: int) -> Found:
    """Sentiment, and where a text comes from."""
    sst2 = bench.text / "sst2"
    data = {"sentiment": (sst2 / "train.tsv", sst2 / "test.tsv"), "source": bench.sources()}
    return _multitask(bench, draw, "text", data)


def _multitask(bench: Bench, draw: int, kind: str, data: dict[str, tuple[Path, Path]]) -> Found:
    results = multitask(
        bench.export(kind), data, sampling="equal", labels_per_class=LABELS, seeds=[draw], **bench.settings
    )
    return {
        f"{kind}: {name}, together over alone": each["lead"]["difference"] for name, each in results["tasks"].items()
    }


def adapt_images(bench: Bench, draw: int) -> Found:
    """To pictures of low contrast."""
    parts = {"train": ("train", 0, 4000), "test": ("test", 0, bench.options.items)}
    grey = {}
    for name, (source, first, count) in parts.items():
        grey[name] = bench.work / "data" / f"grey_{name}"
        if not grey[name].exists():
            corrupt(bench.pictures(f"plain_{name}", source, first, count), grey[name], "contrast", 5)
    target = Target(str(grey["train"]), str(grey["train"]), str(grey["test"]), str(bench.shards / "test"))
    return _adapt(bench, draw, "images", target)


def adapt_text(bench: Bench, draw: int) -> Found:
    """From general text to reviews."""
    sst2, general = bench.text / "sst2", bench.tokens("general") / "validation"
    target = Target(str(bench.tokens("reviews")), str(sst2 / "train.tsv"), str(sst2 / "test.tsv"), str(general))
    return _adapt(bench, draw, "text", target)


def _adapt(bench: Bench, draw: int, kind: str, target: Target) -> Found:
    # Every draw pre-trains anew, with a seed and labels of its own.
    plan = Plan(
        "full", LABELS, (draw,), steps=bench.options.steps, recipe=(f"seed={draw}", "watch.evaluate_samples=256")
    )
    folder = bench.work / f"adapted_{kind}{draw}"
    results = adapt(bench.export(kind), target, plan, folder, **bench.settings)
    before, after = results["pretraining"]["before"], results["pretraining"]["after"]
    found = {f"{kind}: adapted over the encoder as it was": results["lead"]["difference"]}
    return found | {f"{kind}: loss of the source after minus before": after["source_loss"] - before["source_loss"]}


STAGES: dict[str, Callable[[Bench, int], Found]] = {
    "images": images,
    "text": text,
    "multitask_images": multitask_images,
    "multitask_text": multitask_text,
    "adapt_images": adapt_images,
    "adapt_text": adapt_text,
}


def table(results: dict[str, Found]) -> str:
    """One row a comparison, over its draws."""
    rows: dict[str, list[float]] = {}
    for found in results.values():
        for name, value in found.items():
            rows.setdefault(name, []).append(value)
    lines = ["| comparison | each draw | mean | won, level, lost |", "|---|---|---|---|"]
    for name, values in rows.items():
        if "loss of" in name:
            shown, mean, counts = [f"{v:+.3f}" for v in values], f"{np.mean(values):+.3f} nats", ""
        else:
            shown, mean = [f"{100 * v:+.1f}" for v in values], f"{100 * np.mean(values):+.1f} points"
            counts = f"{sum(v > 0 for v in values)}, {sum(v == 0 for v in values)}, {sum(v < 0 for v in values)}"
        lines.append(f"| {name} | {', '.join(shown)} | {mean} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    """Run what has no result yet and print all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shards", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("stages", nargs="*", metavar="STAGE")
    parser.add_argument("--images", type=Path, help="an export to use")
    parser.add_argument("--text", dest="text_export", type=Path, help="an export to use")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--items", type=int, default=2000)
    options = parser.parse_intermixed_args()
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        parser.error(f"there is no stage {', '.join(sorted(unknown))}; choose from {', '.join(STAGES)}")
    options.work.mkdir(parents=True, exist_ok=True)
    file, bench = options.work / "results.json", Bench(options)
    results: dict[str, Found] = json.loads(file.read_text()) if file.exists() else {}
    for stage in options.stages or list(STAGES):
        for draw in range(options.draws):
            key = f"{stage} {draw}"
            if key not in results:
                results[key] = STAGES[stage](bench, draw)
                file.write_text(json.dumps(results, indent=1))
                print(key, results[key], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
