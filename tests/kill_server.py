"""Lives of one run, each in a process forked off this one, which has torch imported; all but the last are killed.

Prints, as JSON, how many kills there were, how many of them met a half-written checkpoint, and the steps reached.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from pretrain import loop
from pretrain.checkpoint import complete, step_of
from pretrain.recipe_file import load_recipe


def live(recipe: Path, run: Path, told: int) -> NoReturn:
    """Train to the end; writes a byte to `told` when the first step has been taken."""
    step = loop.take_step

    def telling(*arguments: Any) -> Any:
        sums = step(*arguments)
        os.write(told, b".")
        loop.take_step = step
        return sums

    loop.take_step = telling
    status = 1
    try:
        loop.train(load_recipe(recipe), run)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def start(recipe: Path, run: Path) -> int:
    """Fork a life and wait for its first step; returns its process id."""
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        live(recipe, run, told)
    os.close(told)
    ready, _, _ = select.select([heard], [], [], 60)
    os.close(heard)
    assert ready
    return child


def main(recipe: Path, run: Path, kills: int, spread: float) -> None:
    """Kill `kills` lives, each at a random moment within `spread` seconds of its first step; then let one end."""
    moments, met, steps = random.Random(kills), 0, []
    for _ in range(kills):
        child = start(recipe, run)
        time.sleep(moments.uniform(0, spread))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the run has ended before it was killed often enough; give it more steps"
        met += bool(list((run / "checkpoints").glob(".*.partial")))
        steps.append(max(map(step_of, complete(run / "checkpoints")), default=0))
    _, status = os.waitpid(start(recipe, run), 0)
    assert status == 0
    print(json.dumps({"kills": kills, "met": met, "steps": steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
