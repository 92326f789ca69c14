"""Loaders side by side: ours, webdataset, litdata, MosaicML streaming, torchvision's ImageFolder.

    python tests/bench/loader.py [WORK_FOLDER] [--only bytes,decode,elastic,shuffle,resume,memory]

Makes its data once in the work folder (about 2.5 GB): CIFAR-10 from `--cifar`, the archive or folder of JPEGs,
and synthetic larger JPEGs, CIFAR pictures enlarged with added noise: 500x375 (the size of ImageNet's) and 1477x1255
(large photos). Everything is read from the page cache. Prints Markdown. Needs `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TQDM_DISABLE"] = "1"

PARTS = ("bytes", "decode", "elastic", "shuffle", "resume", "memory")
_ARCHIVE = Path(__file__).resolve().parents[3] / "shared" / "datasets" / "cifar10.tar.xz"


def main() -> None:
    """Make the data, run the parts asked for, print each when it is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, nargs="?", default=Path("loader-bench"), help="folder for the data")
    parser.add_argument("--cifar", type=Path, default=_ARCHIVE, help="cifar10.tar.xz, or a folder of class folders")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of each timing (default: 3)")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if not set(chosen) <= set(PARTS):
        parser.error(f"--only takes parts of {','.join(PARTS)}")
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    from loaders import elastic, memory, resume, sets, shuffling, speed
    from loaders.table import versions

    arguments.work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    cifar = sets.cifar(arguments.work, arguments.cifar)
    larger = []
    if {"bytes", "decode"} & set(chosen):
        medium = sets.enlarged(arguments.work, cifar, "ImageNet size", (375, 500), count=1600, noise=26)
        large = sets.enlarged(arguments.work, cifar, "large photos", (1255, 1477), count=240, noise=8)
        larger = [medium, large]
    print(f"{versions()}; data made or found in {time.monotonic() - began:.0f} s", flush=True)
    steps = {
        "bytes": lambda: speed.bytes_only([cifar, larger[0]], arguments.rounds),
        "decode": lambda: speed.decoded(larger, arguments.rounds),
        "elastic": lambda: elastic.compare(cifar),
        "shuffle": shuffling.compare,
        "resume": lambda: resume.compare(cifar),
        "memory": lambda: memory.report(cifar, arguments.work),
    }
    for name in chosen:
        began = time.monotonic()
        print(f"\n## {name}\n\n{steps[name]()}\n\n({time.monotonic() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
