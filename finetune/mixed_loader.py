"""Batches that hold samples of several tasks, in exact proportions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from data.cycle import Cycle, exact_shares
from data.errors import UserError
from data.requests import Share
from finetune.encoder import Augmentation
from finetune.loader import Labelled, SampleLoader
from finetune.samples import Samples

Sampling = Literal["proportional", "equal", "temperature"]
SAMPLINGS: tuple[Sampling, ...] = ("proportional", "equal", "temperature")
PARTS = 1000
"""A cycle has about so many places: shares are rounded to a thousandth, and each task has at least one."""


@dataclass
class MixedBatch:
    """Samples of some of the tasks."""

    parts: dict[str, Labelled]
    """By task; those without a sample in this batch are left out."""

    @property
    def ids(self) -> Tensor:
        """int64 (b,), within each task's own data."""
        return torch.cat([part.ids for part in self.parts.values()])

    @property
    def keys(self) -> Tensor:
        """int64 (b,)."""
        return torch.cat([part.keys for part in self.parts.values()])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same on `device`."""
        return type(self)({name: part.to(device, non_blocking=non_blocking) for name, part in self.parts.items()})

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())


def sampling_shares(sizes: Mapping[str, int], sampling: str, temperature: float = 2.0) -> dict[str, int]:
    """Places of each task in one cycle, as small whole numbers.

    Args:
        sizes: labelled samples of each task.
        sampling: `proportional` to the sizes; `equal`; or `temperature`: proportional to
            `size ** (1 / temperature)`, in between (Raffel et al. 2020, "T5", section 3.5.2).

    Raises:
        UserError: another `sampling`, or a temperature below 1.
    """
    if sampling not in SAMPLINGS:
        raise UserError(f"there is no sampling {sampling!r}; choose one of {', '.join(SAMPLINGS)}")
    if temperature < 1:
        raise UserError(f"a sampling temperature of {temperature} would starve small tasks; give 1 or more")
    power = {"proportional": 1.0, "equal": 0.0, "temperature": 1 / temperature}[sampling]
    weights = {name: size**power for name, size in sizes.items()}
    total = sum(weights.values())
    whole = [max(1, round(PARTS * weight / total)) for weight in weights.values()]
    return dict(zip(sizes, exact_shares(whole), strict=True))


class MixedLoader:
    """This process's share of endless global batches over several tasks.

    Which task a position belongs to repeats in cycles, in an order drawn anew for each (`data.cycle`), so shares are
    exact at the end of every one; within a task, samples come in the order and with the keys that they have when it
    is alone. Keeps the contract of `data.loader.Loader`.
    """

    tolerance = 0

    def __init__(
        self,
        tasks: Mapping[str, Samples],
        shares: Mapping[str, int],
        batch_size: int,
        seed: int,
        share: Share,
        augment: Augmentation | None = None,
    ) -> None:
        """Raises `UserError` where a global batch cannot be split evenly over the processes."""
        share.check(batch_size)
        self.loaders = {name: SampleLoader(s, batch_size, seed, share, augment) for name, s in tasks.items()}
        self.cycle = Cycle([shares[name] for name in tasks], seed)
        self.batch_size, self.share, self.position = batch_size, share, 0

    def __iter__(self) -> Iterator[MixedBatch]:
        """Microbatches, for ever, from `position` on."""
        step, position = self.share.microbatch(self.batch_size), self.position
        while True:
            places = self.share.positions(position, self.batch_size)
            numbers, ranks = self.cycle.locate(places)
            for first in range(0, len(places), step):
                parts = {}
                for number, (name, loader) in enumerate(self.loaders.items()):
                    mine = ranks[first : first + step][numbers[first : first + step] == number]
                    if len(mine):
                        epochs, positions = loader.locate(mine)
                        parts[name] = loader.read(positions, loader.samples.keys(loader.seed, epochs, positions))
                if first + step == len(places):
                    position += self.batch_size
                    self.position = position
                yield MixedBatch(parts)

    def take_damage(self) -> tuple[int, list[str]]:
        """None: samples in memory are whole."""
        return 0, []
