"""Learning rates to choose among: shares of the one that the encoder was pre-trained with."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from pretrain.optimizer_settings import AdamWConfig, AnyOptimizer, MuonConfig

SHARES = (0.1, 1 / 3, 1.0)
"""Of the pre-training rate."""
FIXED = (1e-4, 5e-4, 2.5e-3)
"""For trained weights that came without their recipe, or from an optimiser whose rates mean something else."""
ADAPTERS = (1 / 3, 1.0, 3.0)
"""Of AdamW's pre-training rate, for low-rank adapters, which start at nothing and bear more than trained weights. Of
Muon's, which is larger as it is, adapters try `SHARES`."""
FIXED_ADAPTERS = (5e-4, 2e-3, 8e-3)
"""As `FIXED`, for adapters."""
UNTRAINED = (3e-4, 1e-3, 3e-3)
"""As many for the control from scratch: untrained weights bear, and need, larger ones."""


def learning_rates(
    info: dict[str, Any], shares: tuple[float, ...] = SHARES, fixed: tuple[float, ...] = FIXED
) -> tuple[float, ...]:
    """Peak rates of AdamW to try on an encoder, ascending, from its export's `headwater/export.json`: `shares` of
    the pre-training's (`SHARES` where that was Muon's), or the `fixed` ones where it says nothing that helps."""
    recipe = info.get("recipe") or {}
    try:
        optimizer: AnyOptimizer = TypeAdapter(AnyOptimizer).validate_python(recipe["optimizer"])
        peak = optimizer.peak(int(recipe["train"]["batch_size"]))
    except (KeyError, TypeError, ValueError, ValidationError):
        return fixed
    match optimizer:
        case AdamWConfig():
            return tuple(share * peak for share in shares)
        case MuonConfig(scaling="rms"):  # updates as large as AdamW's
            return tuple(share * peak * optimizer.adamw_scale for share in SHARES)
    return fixed
