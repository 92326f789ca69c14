"""What watching costs: the share of a run's time that goes into evaluation, at the default cadence.

    python tests/bench/watching.py [--data SHARDS] [--steps N]

Trains on CIFAR-10 shards and adds up the seconds inside evaluation (held-out loss, features, kNN, effective rank).
The sizes of bank and query set are scaled down with the length of the run, so that the cadence rule, one sample
looked at for every hundred trained on, comes round several times in a short run, as it does in a long one.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from pretrain import pretraining
from pretrain.evaluate import WATCH_SHARE, cadence
from pretrain.loop import train
from pretrain.recipe_file import load_recipe

RECIPES = ("mae_cifar10", "mae_simclr_cifar10")


def measure(name: str, data: str, steps: int) -> dict[str, float]:
    """Seconds of a run and of its evaluations."""
    AcceleratorState._reset_state(reset_partial_state=True)
    batch, rounds = 128, 3
    looked_at = steps * batch // (WATCH_SHARE * rounds)
    settings = [f"data.train={data}", "data.validation=0.02", f"train.batch_size={batch}", f"train.steps={steps}"]
    settings += ["watch.evaluate_every=null", f"watch.evaluate_samples={looked_at // 8}"]
    settings += [f"watch.knn_samples={looked_at * 3 // 4}", "watch.checkpoint_every=1000000"]
    spent = {"evaluations": 0.0, "watching": 0.0, "every": 0.0}
    evaluate = pretraining.evaluate

    def timed(setup: Any) -> dict[str, float]:
        _wait()
        began = time.perf_counter()
        values = evaluate(setup)
        _wait()
        spent["watching"] += time.perf_counter() - began
        spent["evaluations"] += 1
        spent["every"] = cadence(setup)
        return values

    pretraining.evaluate = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            train(load_recipe(name, settings), Path(folder) / "run")
            spent["run"] = time.perf_counter() - began
    finally:
        pretraining.evaluate = evaluate
    return spent


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/datasets/cifar10-shards/train", help="CIFAR-10 shards")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), cuda {torch.cuda.is_available()}")
    print("\n| recipe | steps | evaluations, every | run | watching | share |\n|---|---|---|---|---|---|")
    for name in arguments.recipes:
        spent = measure(name, arguments.data, arguments.steps)
        print(
            f"| {name} | {arguments.steps} | {spent['evaluations']:.0f}, {spent['every']:.0f} | {spent['run']:.1f} s | "
            f"{spent['watching']:.2f} s | {spent['watching'] / spent['run']:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
