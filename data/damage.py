"""Samples that cannot be read, and what takes their place.

A damaged sample stops a run unless the dataset was opened with a tolerance. Then another sample takes its
place: which one is a pure function of the damaged sample's key (so of seed, epoch and id) and of what can be
read, so every process, worker and restart makes the same batches, and no batch is ever short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.errors import DamagedData
from data.keyed import hash64

if TYPE_CHECKING:
    from data.dataset import Ints
    from data.mixture import Samples

_MEMBER, _SHARD = 0xDA3A, 0xDA35
_FROM_ONE_SHARD = 4
_SHARDS_TRIED = 8


class Mended(NamedTuple):
    """A batch, and one sentence for each damaged sample that something else stands for."""

    batch: Any
    reports: tuple[str, ...]


def read_mended(dataset: Samples, read: Callable[[Ints, Ints], Any], ids: Ints, keys: Ints) -> Mended:
    """`read(ids, keys)`, with substitutes where samples are damaged and the dataset tolerates damage.

    A substitute brings its own id and label, and keeps the key of the sample it stands for.

    Raises:
        DamagedData: something is damaged and the dataset tolerates nothing, or no substitute can be read.
    """
    try:
        return Mended(read(ids, keys), ())
    except DamagedData:
        if not dataset.tolerance:
            raise
    sound, reports = ids.copy(), []
    for place in range(len(ids)):
        here = slice(place, place + 1)
        try:
            read(ids[here], keys[here])
        except DamagedData as damage:
            sound[place] = _substitute(dataset, read, int(ids[place]), keys[here], damage)
            reports.append(str(damage))
    return Mended(read(sound, keys), tuple(reports))


def _substitute(
    dataset: Samples, read: Callable[[Ints, Ints], Any], identity: int, key: Ints, damage: DamagedData
) -> int:
    for candidate in candidates(dataset, identity, int(key[0])):
        try:
            read(np.array([candidate], dtype=np.int64), key)
        except DamagedData:
            continue
        return candidate
    raise DamagedData(f"{damage}; nothing readable was found to take its place")


def candidates(dataset: Samples, identity: int, key: int) -> Iterator[int]:
    """Ids of this view that may stand for sample `identity` under `key`, best first.

    First from its own shard, which is at hand; then from shards that depend on its shard alone, so that the
    samples of one lost shard are not looked for in all the others.
    """
    home, counts = dataset.shard(identity), dataset.counts
    tries = _FROM_ONE_SHARD * (1 + _SHARDS_TRIED)
    draws = hash64(_MEMBER, key, np.arange(tries, dtype=np.int64))
    filled = np.flatnonzero(counts)
    others = hash64(_SHARD, home, np.arange(_SHARDS_TRIED, dtype=np.int64)) % np.uint64(len(filled))
    shards = np.repeat([home, *filled[others.astype(np.int64)].tolist()], _FROM_ONE_SHARD)
    for shard, draw in zip(shards.tolist(), draws.tolist(), strict=True):
        if counts[shard]:
            found = int(dataset.ids(np.array([shard]), np.array([draw % int(counts[shard])]))[0])
            if found != identity:
                yield found
