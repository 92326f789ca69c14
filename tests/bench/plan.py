"""Plans held against runs: predicted and measured seconds a step and memory, on this machine's CPU in one thread.

    OMP_NUM_THREADS=1 python tests/bench/plan.py --pictures SHARDS --text SHARDS

Each recipe is planned (`headwater plan --gpu cpu`) and then takes a few steps, each in a process of its own. With one
thread seconds are the processor's, so that other work on the machine counts for little. Memory is the most
that torch holds in tensors beyond the weights, by its own count; beside it what the process came to hold beyond what
it held before its first step: the C library's heap keeps gaps, of which a plan knows nothing. So that libraries' code,
read at its first use, does not count, the process takes a step on two samples before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = {
    "mae_cifar10": [],
    "simclr_cifar10": ["train.batch_size=64"],
    "next_token_small": [],
    "mlm_small": [],
}
"""And settings that make a step short enough."""
_STEPS = 4


def predicted(recipe: str, settings: list[str]) -> dict[str, float]:
    """Seconds a step, and bytes beyond the weights."""
    from launch.plan import Cluster, plan
    from pretrain.recipe_file import load_recipe

    found = plan(load_recipe(recipe, settings), Cluster(gpu="cpu"))
    return {"seconds": found.step, "bytes": sum(found.memory.values()) - found.memory["weights"]}


def measured(recipe: str, settings: list[str]) -> dict[str, float]:
    """The same of the fastest of a few real steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from pretrain.loop import take_step
    from pretrain.recipe_file import load_recipe
    from pretrain.setup import prepare

    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        small = prepare(load_recipe(recipe, [*settings, "train.batch_size=2", "train.microbatch=null"]), Path(folder))
        take_step(small, iter(small.loader))
        del small
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        setup = prepare(load_recipe(recipe, settings), Path(folder))
        batches, seconds = iter(setup.loader), []
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        for _ in range(_STEPS):
            began = clock()
            take_step(setup, batches)
            seconds.append(clock() - began)
        process = _resident("VmHWM") - before
        state = [v for each in setup.state.optimizer.state.values() for v in each.values() if torch.is_tensor(v)]
        held = sum(each.numel() * each.element_size() for each in state)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            take_step(setup, batches)
    return {"seconds": min(seconds), "bytes": held + _most(profiled), "process": process}


def _most(profiled: Any) -> float:
    """The most bytes of tensors that a profiled step held at once beyond what there was before it."""
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    held = itertools.accumulate(each.nbytes() for each in sorted(events, key=lambda each: each.start_ns()))
    return max(held, default=0)


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) * 1024


def alone(what: str, recipe: str, settings: list[str]) -> dict[str, float]:
    """`predicted` or `measured` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, what, recipe, *settings], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(pictures: str, text: str, recipes: list[str]) -> list[dict[str, Any]]:
    """One row a recipe."""
    rows = []
    for recipe in recipes:
        data = pictures if "cifar10" in recipe else text
        settings = [f"data.train={data}", "data.workers=0", *RECIPES[recipe]]
        plan, run = alone("predicted", recipe, settings), alone("measured", recipe, settings)
        rows.append({"recipe": recipe, "settings": RECIPES[recipe], "predicted": plan, "measured": run})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| recipe | predicted s | measured s | error | predicted MB | measured MB | error | process, MB |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        plan, run = row["predicted"], row["measured"]
        cells = [" ".join([row["recipe"], *row["settings"]])]
        for name, scale in (("seconds", 1.0), ("bytes", 1e6)):
            ours, theirs = plan[name] / scale, run[name] / scale
            cells += [f"{ours:.3g}", f"{theirs:.3g}", f"{ours / theirs - 1:+.0%}"]
        lines.append("| " + " | ".join([*cells, f"{run['process'] / 1e6:.3g}"]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] in (["predicted"], ["measured"]):
        print(json.dumps(globals()[sys.argv[1]](sys.argv[2], sys.argv[3:])))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--pictures", required=True, help="shards of CIFAR-10")
        parser.add_argument("--text", required=True, help="shards of text")
        parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES))
        given = parser.parse_args()
        print(table(compare(given.pictures, given.text, given.only)))
