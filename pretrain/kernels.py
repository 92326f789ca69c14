"""Which device's code a step takes: that of its tensors, but where a step is counted for another device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_ASSUMED: ContextVar[str | None] = ContextVar("assumed", default=None)


def kernels(device: torch.device) -> str:
    """The type of device whose code is to be taken for tensors on `device`."""
    return _ASSUMED.get() or device.type


@contextmanager
def counted_for(device_type: str) -> Iterator[None]:
    """Take the code of another type of device, for tensors that hold no numbers; see `pretrain.cost`."""
    token = _ASSUMED.set(device_type)
    try:
        yield
    finally:
        _ASSUMED.reset(token)
