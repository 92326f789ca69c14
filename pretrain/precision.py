"""How a precision is written, and which one a device takes by itself."""

from __future__ import annotations

from typing import Any, Literal

import torch


def spelled(value: Any) -> Any:
    """`no` for False, which is what YAML 1.1 makes of an unquoted `no`; anything else as it is."""
    return "no" if value is False else value


def multiplies_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices itself: CUDA from compute capability 8.0, CPUs with such units."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()  # AMX brings bfloat16 with its tiles


def best(device: torch.device) -> Literal["no", "bf16"]:
    """What `train.precision: auto` stands for on `device`: `bf16` where it multiplies that, else `no` (float32)."""
    return "bf16" if multiplies_bf16(device) else "no"


def caution(precision: str, device: torch.device) -> str | None:
    """What to know about training in `precision` on `device`, in words; None where nothing is."""
    if precision != "bf16" or multiplies_bf16(device):
        return None
    return (
        f"train.precision=bf16 on a {device.type} that does not multiply bfloat16 itself: a step may take many times "
        "as long as in float32; train.precision=auto chooses what this machine is fast at (for a new run, in another "
        "--output)"
    )
