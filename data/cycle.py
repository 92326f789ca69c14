"""Taking turns in exact proportions: which of several datasets a place in the stream is for."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data.errors import UserError
from data.keyed import hash64
from data.order import Ints

LONGEST_CYCLE = 2**16
_CYCLE = 3
"""Separates the hash that orders a cycle from others."""
_REMEMBERED = 4


class Cycle:
    """Which dataset each group of positions is for: a pure function of (seed, group)."""

    def __init__(self, shares: Sequence[int], seed: int) -> None:
        self.shares, self.seed = np.asarray(shares, dtype=np.int64), seed
        self.length = int(self.shares.sum())
        self._kinds = np.repeat(np.arange(len(shares)), self.shares)
        self._remembered: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()

    def locate(self, groups: Ints) -> tuple[Ints, Ints]:
        """Each group's dataset, and its number among the groups of that dataset since the start."""
        cycles, places = groups // self.length, groups % self.length
        datasets, ranks = np.empty_like(groups), np.empty_like(groups)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            kinds, before = self._cycle(int(cycle))
            datasets[here], ranks[here] = kinds[places[here]], before[places[here]]
        return datasets, cycles * self.shares[datasets] + ranks

    def _cycle(self, cycle: int) -> tuple[Ints, Ints]:
        if cycle not in self._remembered:
            permuted = np.argsort(hash64(self.seed, _CYCLE, cycle, np.arange(self.length, dtype=np.int64)))
            kinds = self._kinds[permuted]
            before = np.empty(self.length, dtype=np.int64)
            for number, share in enumerate(self.shares):
                before[kinds == number] = np.arange(share)
            self._remembered[cycle] = (kinds, before)
            if len(self._remembered) > max(_REMEMBERED, 2**12 // self.length):
                self._remembered.popitem(last=False)
        return self._remembered[cycle]


def exact_shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the proportions of `weights`; 0.1 means one tenth, not its nearest double.

    Raises:
        UserError: weights that are not positive, or need more than `LONGEST_CYCLE` groups.
    """
    try:
        fractions = [Fraction(str(weight)) for weight in weights]
    except ValueError:
        fractions = []
    if not fractions or min(fractions) <= 0:
        raise UserError(f"the weights {list(weights)} are no proportions; give a positive number for each dataset")
    whole = [int(f * math.lcm(*(f.denominator for f in fractions))) for f in fractions]
    shares = [number // math.gcd(*whole) for number in whole]
    if sum(shares) > LONGEST_CYCLE:
        raise UserError(
            f"the weights {list(weights)} need {sum(shares)} places to be exact, more than {LONGEST_CYCLE}; "
            "round them to fewer digits"
        )
    return shares
