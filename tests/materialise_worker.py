"""One of two processes that begin runs sharded and not, and gather them to export. Started twice by a test."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from sharded_worker import sharded, steps, whole_tensors

from pretrain.recipe_file import load_recipe
from pretrain.setup import prepare
from pretrain.sharding import is_sharded
from pretrain.whole import collected


def peak() -> int:
    """Most bytes that this process has held at a time. Not `ru_maxrss`: that begins with what the parent held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def observe(path: Path) -> dict[str, Any]:
    """Initial tensors, the loss of two steps, and what exporting would write."""
    seen: dict[str, Any] = {}
    for kind, yes in (("sharded", True), ("plain", False)):
        setup = prepare(sharded(load_recipe(path), yes), path.parent)
        seen[f"{kind} start"] = whole_tensors(setup)
        seen[f"{kind} losses"] = steps(setup, 2)
        assert is_sharded(setup.state.objective) == yes
    return seen


def measure(path: Path) -> dict[str, Any]:
    """How much more memory a sharded start, and then an export, takes at its peak; and what it gathers."""
    recipe = sharded(load_recipe(path), True)
    before = peak()
    setup = prepare(recipe, path.parent)
    begun = peak()
    tensors = whole_tensors(setup) if setup.main else {}
    if not setup.main:
        for part in setup.state.snapshot(recipe, "data").tensors.values():
            for tensor in part.values():
                _ = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    gathered = peak()
    state = collected(setup)
    same = None
    if state is not None:
        mine = state.objective.state_dict()
        same = all(torch.equal(mine[name.partition("/")[2]], tensors[name]) for name in tensors if "model/" in name)
    return {"start": begun - before, "export": peak() - gathered, "state": state is not None, "same": same}


if __name__ == "__main__":
    out, task, *paths = sys.argv[1:]
    found = [{"observe": observe, "measure": measure}[task](Path(path)) for path in paths]
    torch.save(found, out)
