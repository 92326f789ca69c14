"""One and two processes on the same global batches: efficiency, and what of a step is not compute.

    python tests/bench/scaling.py --data SHARDS [--recipe mae_cifar10] [--steps 40]

Each run is `headwater pretrain` with one thread a process, started anew, in turns; a figure is the fastest round's.
Efficiency is the speed of two processes over twice that of one; what is missing from 1, less the wait for data, is
gradients on their way and waiting for each other. On two cores it also holds what the cores take from each other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def run(recipe: str, data: str, steps: int, processes: int) -> dict[str, float]:
    """Samples a second and share of time waited for data, from the run's own metrics, without the first steps."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["pretrain", recipe, f"data.train={data}", f"train.steps={steps}", "data.workers=0"]
        words += ["watch.evaluate_every=0", f"watch.log_every={steps}", "watch.checkpoint_every=1000000"]
        words += ["--processes", str(processes), "--output", f"{folder}/run"]
        command = [sys.executable, "-m", "launch.cli", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        last = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return {"speed": last["samples_per_second"], "waiting": last["data_wait"]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--recipe", default="mae_cifar10")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    rounds = [{n: run(given.recipe, given.data, given.steps, n) for n in (1, 2)} for _ in range(given.rounds)]
    best = {n: max((each[n] for each in rounds), key=lambda found: found["speed"]) for n in (1, 2)}
    efficiency = best[2]["speed"] / best[1]["speed"] / 2
    print("| processes | samples/s | waiting for data | efficiency | neither compute nor data |\n" + "|---" * 5 + "|")
    for n, found in best.items():
        share = 1.0 if n == 1 else efficiency
        rest = max(0.0, 1 - share - found["waiting"])
        print(f"| {n} | {found['speed']:,.1f} | {found['waiting']:.1%} | {share:.2f} | {rest:.1%} |")


if __name__ == "__main__":
    main()
