"""Which patches are hidden: drawn from the samples' keys, with shapes that do not depend on the draw.

Every mask of a kind hides the same number of patches, or marks them in a mask of fixed shape. So a batch of
masks is one tensor, nothing waits for the device, and a sample's mask does not depend on the batch around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import UserError
from data.keyed import permutation, uniform

_BLOCKS = 24
"""Blocks tried for a block-wise mask, before single patches fill what is missing."""
_CANDIDATES = 10
"""Layouts tried for a multi-block mask, before the one that always fits."""


def exactly_k(keys: Tensor, patches: int, hidden: int, stream: str = "mask") -> Tensor:
    """Hide `hidden` of `patches` patches, any set as likely as another: bool (b, patches), True where hidden."""
    return permutation(keys, stream, patches).argsort(dim=1) < hidden


@dataclass(frozen=True)
class BlockwiseMask:
    """Rectangles that overlap until a given share is hidden (BEiT, algorithm 1; iBOT, section 4.1)."""

    ratio: tuple[float, float] = (0.1, 0.5)
    """Share of hidden patches, drawn uniformly (iBOT, section 4.1)."""
    probability: float = 0.5
    """Share of samples that are masked at all (iBOT: half of the views)."""
    smallest: int = 4
    """Fewest patches of a rectangle."""
    aspect: float = 0.3
    """Smallest aspect; it is drawn log-uniformly from [aspect, 1 / aspect]."""


def blockwise(keys: Tensor, grid: tuple[int, int], config: BlockwiseMask, stream: str = "mask") -> Tensor:
    """Block-wise masks: bool (b, rows * columns), True where hidden.

    A sample's count of hidden patches is exact: `ratio` is drawn and rounded first; rectangles that would go
    beyond it are passed over, and single patches fill the rest. (BEiT's own loop may stop short of it.)
    """
    rows, columns = grid
    patches = rows * columns
    drawn = uniform(keys, f"{stream}.ratio", (2,))
    share = config.ratio[0] + drawn[:, 1] * (config.ratio[1] - config.ratio[0])
    goal = torch.where(drawn[:, 0] < config.probability, torch.round(share * patches), 0.0)
    # In double precision, so that the last bit of an exponential cannot move a border.
    blocks = uniform(keys, f"{stream}.blocks", (_BLOCKS, 4)).to(torch.float64)
    spread = -math.log(config.aspect)
    hidden = torch.zeros(len(keys), rows, columns, dtype=torch.bool, device=keys.device)
    for block in blocks.unbind(dim=1):
        left = goal - hidden.sum(dim=(1, 2))
        area = config.smallest + block[:, 0] * (left - config.smallest).clamp(min=0.0)
        aspect = torch.exp(spread * (2.0 * block[:, 1] - 1.0))
        tall = torch.round(torch.sqrt(area * aspect)).clamp(1, rows)
        wide = torch.round(torch.sqrt(area / aspect)).clamp(1, columns)
        grown = hidden | _rectangle(torch.stack([tall, wide], dim=1), block[:, 2:], grid)
        fits = grown.sum(dim=(1, 2)) <= goal
        hidden = torch.where(fits[:, None, None], grown, hidden)
    return _fill(hidden.flatten(1), goal, permutation(keys, f"{stream}.fill", patches))


@dataclass(frozen=True)
class MultiBlockMask:
    """I-JEPA's masks (Assran et al., CVPR 2023, section 3 and appendix A.1), in fixed numbers."""

    targets: int = 4
    """Target blocks, which may overlap."""
    target_share: float = 0.175
    """Patches of each as a share of all; the middle of the paper's [0.15, 0.2]."""
    target_aspect: tuple[float, float] = (0.75, 1.5)
    """Height over width of a target block, drawn uniformly."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Area of the context block before the targets are cut out of it."""
    context_share: float = 0.3
    """Patches that the context keeps, as a share of all."""


def multi_block(
    keys: Tensor, grid: tuple[int, int], config: MultiBlockMask, stream: str = "mask"
) -> tuple[Tensor, Tensor]:
    """Context and target patches: int64 (b, context) and (b, targets, target), ascending patch numbers.

    Every target block has exactly `target_share` of the patches (its last or first row may be cut short) and the
    context exactly `context_share`, a random choice from its block less all targets: no target is in the
    context. The paper instead draws one size for the whole batch and cuts every context to the smallest of
    the batch. Of several layouts drawn, the first that leaves enough context is taken; if none does, all
    targets lie in one place.

    Raises:
        UserError: the shares leave no target, no context, or do not fit beside each other.
    """
    rows, columns = grid
    patches = rows * columns
    target, context = round(config.target_share * patches), round(config.context_share * patches)
    if not 0 < target < patches or not 0 < context <= patches - target:
        raise UserError(
            f"a grid of {rows} x {columns} patches cannot give targets of {target} and a context of {context}; "
            "change target_share and context_share"
        )
    shape = (_CANDIDATES, config.targets, 4)
    blocks = uniform(keys, f"{stream}.targets", shape).to(torch.float64)
    low, high = config.target_aspect
    aspect = low + blocks[..., 0] * (high - low)
    tall = torch.round(torch.sqrt(target * aspect)).clamp(math.ceil(target / columns), rows)
    wide = torch.ceil(target / tall)
    chosen = _rectangle(torch.stack([tall, wide], dim=-1), blocks[..., 1:3], grid).flatten(-2)
    counted = chosen.cumsum(dim=-1)
    # What is too much is cut off the end of the last row or off the start of the first.
    chosen &= torch.where(blocks[..., 3:] < 0.5, counted <= target, counted > counted[..., -1:] - target)
    around = uniform(keys, f"{stream}.context", (3,))
    scale = config.context_scale[0] + around[:, 0] * (config.context_scale[1] - config.context_scale[0])
    sides = torch.sqrt(scale)[:, None] * torch.tensor([float(rows), float(columns)], device=keys.device)
    block = _rectangle(torch.round(sides), around[:, 1:], grid).flatten(-2)
    free = block[:, None] & ~chosen.any(dim=2)
    enough = free.sum(dim=2) >= context
    first = enough.to(torch.int64).argmax(dim=1)
    picked = chosen[torch.arange(len(keys), device=keys.device), first]
    found = enough.any(dim=1)
    picked = torch.where(found[:, None, None], picked, picked[:, :1])
    allowed = ~picked.any(dim=1) & (block | ~found[:, None])
    kept = _first(allowed, permutation(keys, f"{stream}.keep", patches), context)
    return _numbers(kept, context), _numbers(picked, target)


def _rectangle(sides: Tensor, place: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rectangles of whole `sides` (..., 2) at `place` (..., 2) in [0, 1) of the free room: bool (..., *grid)."""
    room = torch.tensor([float(grid[0]), float(grid[1])], device=sides.device)
    start = torch.floor(place * (room - sides + 1.0))
    inside = []
    for axis, length in enumerate(grid):
        spots = torch.arange(length, device=sides.device)
        begin, end = start[..., axis, None], (start + sides)[..., axis, None]
        inside.append((spots >= begin) & (spots < end))
    return inside[0][..., :, None] & inside[1][..., None, :]


def _fill(hidden: Tensor, goal: Tensor, order: Tensor) -> Tensor:
    """Hide more patches, in a random order, until `goal` are."""
    return _first(~hidden, order, goal[:, None] - hidden.sum(dim=1, keepdim=True)) | hidden


def _first(allowed: Tensor, order: Tensor, count: int | Tensor) -> Tensor:
    """The first `count` allowed patches in each sample's `order`: bool (b, patches)."""
    ordered = allowed.gather(1, order)
    taken = ordered & (ordered.cumsum(dim=1) <= count)
    return torch.zeros_like(allowed).scatter(1, order, taken)


def _numbers(chosen: Tensor, count: int) -> Tensor:
    """Where `chosen` is true, exactly `count` times in each row: int64 (..., count), ascending."""
    return (~chosen).to(torch.int64).argsort(dim=-1, stable=True)[..., :count]
