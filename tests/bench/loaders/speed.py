"""How many samples a second, side by side: every round runs every loader once, and medians are compared."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from statistics import median

from loaders.contenders import CONTENDERS, Batches, Decode, pil_crop, tensor_crop
from loaders.sets import Pictures
from loaders.table import table

Rates = dict[str, list[float]]


def bytes_only(sets: list[Pictures], rounds: int) -> str:
    """Encoded pictures, in-process and with two workers."""
    parts = []
    for pictures in sets:
        for workers in (0, 2):
            makers = {name: (name, None) for name in CONTENDERS}
            parts.append(_compared(pictures, workers, makers, rounds, "bytes only"))
    return "\n\n".join(parts)


def decoded(sets: list[Pictures], rounds: int) -> str:
    """Decode and random resized crop to 224, in-process and with two workers.

    Peers by Pillow, their default, and once more by torchvision's tensor functions where that is cheap to try.
    """
    parts = []
    for pictures in sets:
        for workers in (0, 2):
            makers: dict[str, tuple[str, Decode | None]] = {name: (name, pil_crop) for name in CONTENDERS}
            makers["ImageFolder, decode_jpeg"] = ("ImageFolder", tensor_crop)
            parts.append(_compared(pictures, workers, makers, rounds, "decode + random resized crop 224"))
    return "\n\n".join(parts)


def _compared(
    pictures: Pictures, workers: int, makers: dict[str, tuple[str, Decode | None]], rounds: int, what: str
) -> str:
    rates: Rates = {name: [] for name in makers}
    for number in range(rounds):
        # Another loader goes first in each round.
        names = list(makers)[number % len(makers) :] + list(makers)[: number % len(makers)]
        for name in names:
            loader, decode = makers[name]
            rates[name].append(_alone(lambda: CONTENDERS[loader](pictures, workers, decode), pictures.batch))  # noqa: B023
    ours = rates["headwater"]
    rows = []
    for name, found in rates.items():
        ratio = median(one / other for one, other in zip(ours, found, strict=True))
        rows.append([name, f"{median(found):,.0f}", f"{min(found):,.0f}–{max(found):,.0f}", f"{ratio:.2f}×"])
    caption = f"**{pictures.describe()}; {what}; {workers} workers** (samples/s, {rounds} interleaved rounds)"
    return caption + "\n\n" + table(["loader", "median", "range", "headwater is"], rows)


def _alone(make: Callable[[], Batches], size: int) -> float:
    """`_rate` in a process of its own: some loaders leave threads behind, which would slow the next one."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(_rate(make(), size)))
    process.start()
    sender.close()
    try:
        return float(receiver.recv())
    finally:
        process.join()


def _rate(batches: Batches, size: int, seconds: float = 0.6, warm: int = 2) -> float:
    """Samples a second once workers are up: whole batches for at least `seconds`."""
    try:
        for _ in range(warm):
            next(batches)
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            next(batches)
            count += 1
        return count * size / (time.perf_counter() - began)
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
