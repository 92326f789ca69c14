"""What each objective gains in seconds of one core: the table behind settings and margins of `test_learning.py`.

    python tests/bench/learning.py CIFAR10_TAR_XZ [--cases simclr byol] [--judges tuning]

Settings and margins are picked on the `tuning` pictures, of the training split; `test` only reports what was picked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from learning_cases import CASES
from learning_kit import gain, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="cifar10.tar.xz with train/CLASS/N.jpg and test/CLASS/N.jpg")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--judges", choices=("tuning", "test"), default="tuning")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    splits = read(arguments.archive)
    judges = getattr(splits, arguments.judges)
    print(f"| objective | steps of 128 | untrained | trained | effective rank | CPU seconds |  ({arguments.judges})")
    print("|---|---|---|---|---|---|")
    for name in arguments.cases:
        found = gain(CASES[name].recipe(name), splits.train, judges)
        row = f"{found.untrained:.3f} | {found.trained:.3f} | {found.rank:.1f} | {found.seconds:.1f}"
        print(f"| {name} | {CASES[name].steps} | {row} |", flush=True)


if __name__ == "__main__":
    main()
