"""Feature extraction and full fine-tuning beside timm's loader and loop and transformers' Trainer, in turns.

    python tests/bench/finetune_speed.py SHARDS FOLDERS TEXT_EXPORT TSV [--rounds 5] [--threads 1] [--small]

`SHARDS` are ours and `FOLDERS` the same pictures as class folders; `TEXT_EXPORT` is a text encoder's export (not a
causal one) and `TSV` labelled texts. On each side the same network, samples, batch, precision and number of steps:

- **pictures** against timm: see `finetune_speed_pictures.py`.
- **text** against a plain loop over transformers' model, and its Trainer: see `finetune_speed_text.py`.

*A further step* of fine-tuning is timed as the difference between a fit and one of twice as many steps, so that what
happens once is left out: ours decodes all pictures into memory, or tokenises, and standardises the head's input over a
few hundred samples; the others open the folder, or tokenise, and build their loader. *A whole fit* is the longer of the
two with all of that, from data on disk. Rounds alternate which side goes first; a ratio is the median of the rounds'
ratios, of wall time and, in brackets, of the process's CPU time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Contest:
    """Two sides of the same work: ours first."""

    name: str
    rival: str
    sides: tuple[Callable[[int], object], Callable[[int], object]]
    """Each does the given amount of work: samples, or steps of fine-tuning."""
    amount: int
    batch: int | None = None
    """Samples a step where work is counted in steps."""
    times: list[list[tuple[float, float]]] = field(default_factory=lambda: [[], []])
    """Of each side a pair (wall, CPU) of seconds for every amount and round."""

    def round(self, turn: int) -> None:
        """Time both sides once; who begins depends on the turn."""
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            for amount in (self.amount,) if self.batch is None else (self.amount, 2 * self.amount):
                wall, cpu = time.perf_counter(), time.process_time()
                self.sides[side](amount)
                self.times[side].append((time.perf_counter() - wall, time.process_time() - cpu))

    def lines(self) -> list[str]:
        """What came out, one line a measure."""
        if self.batch is None:
            return [self._line(self.name, self.amount, *self.times)]
        further, whole = [], []
        for side in self.times:
            pairs = list(zip(side[::2], side[1::2], strict=True))
            further.append([(max(b[0] - a[0], 1e-9), max(b[1] - a[1], 1e-9)) for a, b in pairs])
            whole.append([b for _, b in pairs])
        samples = self.amount * self.batch
        return [
            self._line(f"{self.name}, a further step", samples, *further),
            self._line(f"{self.name}, a whole fit of {2 * self.amount} steps", 2 * samples, *whole),
        ]

    def _line(self, name: str, samples: int, ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> str:
        wall, cpu = (statistics.median(b[i] / a[i] for a, b in zip(ours, theirs, strict=True)) for i in (0, 1))
        mine, other = (samples / statistics.median(each[0] for each in side) for side in (ours, theirs))
        return f"{name:<44} {mine:>8,.0f} headwater {other:>8,.0f} {self.rival:<29} x {wall:.2f} (CPU x {cpu:.2f})"


def arguments_from(words: list[str] | None) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path)
    parser.add_argument("folders", type=Path)
    parser.add_argument("text_export", type=Path)
    parser.add_argument("tsv", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2000, help="pictures, and texts")
    parser.add_argument("--steps", type=int, default=20, help="of the shorter fit")
    parser.add_argument("--picture-batch", type=int, default=64)
    parser.add_argument("--text-batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a few samples, steps and rounds: to see that it works")
    arguments = parser.parse_args(words)
    if arguments.small:
        arguments.rounds, arguments.samples, arguments.steps = 1, 48, 1
        arguments.picture_batch, arguments.text_batch = 8, 8
    return arguments


def main(words: list[str] | None = None) -> None:
    """Print samples a second of both sides, and ratios."""
    arguments = arguments_from(words)
    from finetune_speed_pictures import picture_contests
    from finetune_speed_text import text_contests

    torch.set_num_threads(arguments.threads)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        contests = [*picture_contests(arguments, Path(name)), *text_contests(arguments, Path(name))]
        for contest in [] if arguments.small else contests:  # libraries are loaded and memory is claimed at a first use
            for side in contest.sides:
                side(1 if contest.batch else contest.amount)
        for turn in range(arguments.rounds):
            for contest in contests:
                contest.round(turn)
    print(
        f"samples a second, {arguments.threads} thread(s); batches of {arguments.picture_batch} pictures and of "
        f"{arguments.text_batch} texts; medians of {arguments.rounds} rounds; {time.perf_counter() - began:.0f} s"
    )
    for contest in contests:
        print("\n".join(contest.lines()))


if __name__ == "__main__":
    main()
