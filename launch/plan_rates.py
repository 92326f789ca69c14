"""How long a counted step takes: the roofline of a GPU's datasheet, or of what this machine's CPU does when asked."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from launch.plan_devices import LAUNCH, Accelerator
from pretrain.ledger import Kind, Work


class Seconds(NamedTuple):
    """Of one device, for one step, by what limits each kernel."""

    compute: float
    """In kernels that wait for arithmetic."""
    memory: float
    """In kernels that wait for memory."""
    launch: float
    """Of starting kernels, which goes on beside them on a GPU."""

    @property
    def busy(self) -> float:
        """In kernels."""
        return self.compute + self.memory


class Rates(Protocol):
    """A device, as fast as it is."""

    def seconds(self, work: Counter[Work], fused: bool) -> Seconds:
        """Of a step; `fused` where torch.compile joins what is neither a product nor attention."""
        ...


@dataclass(frozen=True)
class Roofline:
    """A GPU: each kernel takes as long as its operations or its bytes do, whichever is longer (Williams et al. 2009).

    Products of 16-bit numbers run at the rate of the best matrix product known, the rest at datasheet rates. Fused
    kernels are taken to keep every other byte: what one writes for the next stays on the chip.
    """

    device: Accelerator

    def seconds(self, work: Counter[Work], fused: bool) -> Seconds:
        """See `Rates`."""
        compute = memory = 0.0
        for each, times in work.items():
            rate = self.device.half * self.device.reached if each.half else self.device.full
            moved = each.bytes / (2 if fused and each.kind == "other" else 1)
            arithmetic, traffic = each.flops / rate, moved / self.device.bandwidth
            compute += times * arithmetic if arithmetic > traffic else 0.0
            memory += times * traffic if traffic >= arithmetic else 0.0
        return Seconds(compute, memory, LAUNCH * sum(work.values()) * (0.2 if fused else 1.0))


@dataclass(frozen=True)
class Measured:
    """This machine's CPU with torch's present number of threads: rates by the size of a kernel."""

    curves: dict[tuple[Kind, bool], list[tuple[float, float]]]
    """For each kind, in 32 or 16 bits: (operations, operations a second), ascending; for "other": bytes."""
    overhead: float
    """Seconds of a kernel that does next to nothing."""

    def seconds(self, work: Counter[Work], fused: bool) -> Seconds:
        """See `Rates`; kernels run one after the other, so that starting them adds up."""
        compute = memory = 0.0
        for each, times in work.items():
            if each.kind == "other":
                memory += times * each.bytes / _at(self.curves["other", False], each.bytes)
            else:
                arithmetic = each.flops / _at(self.curves[each.kind, each.half], each.flops)
                traffic = each.bytes / _at(self.curves["other", False], each.bytes)
                compute += times * arithmetic if arithmetic > traffic else 0.0
                memory += times * traffic if traffic >= arithmetic else 0.0
        return Seconds(compute, memory, self.overhead * sum(work.values()))


def measure_cpu() -> Measured:
    """Time a few kernels of each kind, two seconds in all."""
    curves: dict[tuple[Kind, bool], list[tuple[float, float]]] = {}
    for half in (False, True):
        dtype = torch.bfloat16 if half else torch.float32
        curves["matmul", half] = [_product(side, dtype) for side in (32, 128, 512)]
        curves["attention", half] = [_attention(batch, dtype) for batch in (2, 64)]
        curves["convolution", half] = [_convolution(b, dtype) for b in (2, 32)]
    curves["other", False] = [_elementwise(rows) for rows in (16, 1024, 8192, 49152, 81920)]
    tiny = torch.zeros(4)
    return Measured(curves, fastest(lambda: tiny + tiny))


def _product(side: int, dtype: torch.dtype) -> tuple[float, float]:
    a, b = torch.randn(4 * side, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
    flops = 8.0 * side**3
    return flops, flops / fastest(lambda: a @ b)


def _attention(batch: int, dtype: torch.dtype) -> tuple[float, float]:
    """The mean rate of both directions, at the size of the forward one; the other takes 2.5 times its operations."""
    x = torch.randn(batch, 4, 64, 32, dtype=dtype, requires_grad=True)
    flops = 4.0 * x.numel() * 64
    return flops, 3.5 * flops / fastest(lambda: F.scaled_dot_product_attention(x, x, x).backward(x))


def _convolution(batch: int, dtype: torch.dtype) -> tuple[float, float]:
    pictures, weight = torch.randn(batch, 64, 16, 16, dtype=dtype), torch.randn(64, 64, 3, 3, dtype=dtype)
    flops = 2.0 * pictures.numel() * 64 * 9
    return flops, flops / fastest(lambda: F.conv2d(pictures, weight, padding=1))


def _elementwise(rows: int) -> tuple[float, float]:
    """Of what lies between matrix products: a sum, a copy, a norm and an activation, each reading and writing once.

    The largest are beyond 32 MiB, from where the C library asks the system for fresh memory each time.
    """
    x, gain = torch.randn(rows, 128), torch.ones(128)
    basket: list[Callable[[], Tensor]] = [
        lambda: x + 1.0,
        lambda: x.clone(),
        lambda: F.layer_norm(x, (128,), gain),
        lambda: F.gelu(x),
    ]
    size = 2.0 * x.numel() * x.element_size()
    return size, len(basket) * size / sum(fastest(each) for each in basket)


def fastest(run: Callable[[], object], seconds: float = 0.05) -> float:
    """Seconds of the fastest of the runs that fit into `seconds`, at least two after one to warm up.

    With one thread it is the processor's time, which other programs do not lengthen.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    run()
    best, end, runs = math.inf, time.perf_counter() + seconds, 0
    while runs < 2 or time.perf_counter() < end:
        began = clock()
        run()
        best, runs = min(best, clock() - began), runs + 1
    return best


def _at(curve: list[tuple[float, float]], size: float) -> float:
    """The rate at `size`, between the measured ones by its logarithm, constant beyond them."""
    low = curve[0]
    if size <= low[0]:
        return low[1]
    for high in curve[1:]:
        if size < high[0]:
            share = math.log(size / low[0]) / math.log(high[0] / low[0])
            return low[1] * (high[1] / low[1]) ** share
        low = high
    return low[1]
