"""What accelerators and links can do on paper, each figure with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from data.errors import UserError


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU; rates a second, dense (without structured sparsity)."""

    name: str
    half: float
    """Operations on 16-bit floats in matrix products."""
    full: float
    """Operations on float32; torch's default keeps TF32 out of matrix products."""
    reached: float
    """Share of `half` that the best matrix product reaches."""
    bandwidth: float
    """Bytes a second of device memory."""
    memory: float
    """Bytes."""
    watts: float
    """Thermal design power."""
    link: float
    """Bytes to each other GPU of the node, in one direction."""
    source: str


_MATMUL = "best matrix product: S. Bekman, Machine Learning Engineering, maximum achievable matmul FLOPS"
ACCELERATORS = {
    each.name: each
    for each in (
        Accelerator("a100", 312e12, 19.5e12, 0.869, 2.039e12, 80e9, 400, 300e9, "NVIDIA A100 80GB SXM datasheet"),
        Accelerator("h100", 989e12, 67e12, 0.803, 3.35e12, 80e9, 700, 450e9, "NVIDIA H100 SXM datasheet"),
        Accelerator("h200", 989e12, 67e12, 0.803, 4.8e12, 141e9, 700, 450e9, "NVIDIA H200 SXM datasheet"),
        Accelerator("b200", 2250e12, 75e12, 0.776, 8e12, 180e9, 1000, 900e9, "NVIDIA HGX B200 datasheet"),
    )
}
CORES = 14
"""CPU cores beside each GPU: 112 for eight in a DGX H100 (NVIDIA DGX H100 datasheet)."""
LAUNCH = 5e-6
"""Seconds in which Python and the driver start a kernel; an assumption."""
STORAGE = 12.5e9
"""Bytes a second that a node reads: one 100 Gb/s Ethernet port; an assumption."""


class Link(NamedTuple):
    """What connects nodes."""

    bandwidth: float
    """Bytes a second of a node in one direction, over all its ports."""
    about: str


LINKS = {
    "ndr": Link(400e9, "eight 400 Gb/s NDR InfiniBand ports a node (NVIDIA DGX H100 datasheet)"),
    "hdr": Link(200e9, "eight 200 Gb/s HDR InfiniBand ports a node (NVIDIA DGX A100 datasheet)"),
    "ethernet100": Link(12.5e9, "one 100 Gb/s Ethernet port a node (IEEE 802.3)"),
    "ethernet25": Link(3.125e9, "one 25 Gb/s Ethernet port a node (IEEE 802.3)"),
}


class Published(NamedTuple):
    """What others report of a like run, to hold a plan against."""

    recipe: str
    device: str
    samples: float
    """A second and GPU."""
    source: str


PUBLISHED = (
    Published("mae_vitb16_imagenet1k", "a100", 1980, "DailyMAE: 800 epochs in 18 hours on 8 GPUs"),
    Published("gpt2_124m", "h200", 310_000 / 1024, "125M model, packed rows of 2,048: 310,000 tokens/s"),
    Published("modernbert_base", "h100", 307_000 / 1024, "ModernBERT-base, phase 1: 307,000 tokens/s"),
)
"""Models, rows and software differ in details from ours, so these are neighbours and no measurements of headwater."""


class Loading(NamedTuple):
    """How a sample gets from disk to the device."""

    decoded: float
    """Samples that a CPU core decodes a second; infinite for tokens, which are read as they are."""
    bytes: float
    """Of a stored sample."""
    source: str


def assumed_loading(kind: str, side: int) -> Loading:
    """Where there are no data to look at: pictures of `side` pixels, or rows of `side` tokens."""
    if kind == "text":
        return Loading(float("inf"), 2.0 * side, "assumed: two bytes a token, nothing to decode")
    if side <= 64:
        return Loading(6500, 1545, "assumed: CIFAR-10 as JPEG, 1,545 bytes; 13,000 a second decoded on two cores")
    return Loading(777, 110e3, "assumed: ImageNet size, 110 kB; 1,554 a second on two cores (tests/bench/RESULTS.md)")


SETS = {"cifar10": 50_000, "imagenet1k": 1_281_167, "imagenet22k": 14_197_122}
"""Training samples of sets that recipes are named after (Krizhevsky 2009; Russakovsky et al. 2015; image-net.org)."""


def accelerator(name: str) -> Accelerator:
    """By name; raises `UserError` for one that is not in the table."""
    if name not in ACCELERATORS:
        raise UserError(f"--gpu {name!r} is not in the table; use {', '.join(ACCELERATORS)}, or cpu for this machine")
    return ACCELERATORS[name]
