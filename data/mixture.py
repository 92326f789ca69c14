"""Several datasets as one, in exact proportions.

Which dataset a position belongs to repeats in cycles: with weights 3 and 1, each cycle of 4 groups holds 3 of the
first dataset and 1 of the second, in an order drawn anew for every cycle. So proportions are exact at the end of
every cycle, and the place within a dataset (how many of its samples came before) is a division, not a count:
resuming costs the same at any position. A group is as many positions as there are lanes, so that a lane stays one
in every dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.cycle import Cycle, exact_shares
from data.dataset import Ints, SampleStream, ShardedDataset
from data.errors import UserError
from data.keyed import hash64
from data.order import BLOCK_SAMPLES

_DATASET = 4
"""Gives each dataset a seed of its own."""


class Mixture:
    """Datasets of one kind, drawn from in proportion to their weights.

    Each is shuffled and repeated on its own: a small one with a large weight is seen in more epochs. Looks like
    one `ShardedDataset` whose shards are those of all, one dataset after the other; `len()` counts the samples of
    all once. Classes are joined by name.
    """

    def __init__(self, datasets: Sequence[ShardedDataset], weights: Sequence[float]) -> None:
        """Raises `UserError` when the datasets cannot be mixed, or the weights are no proportions."""
        self.datasets = list(datasets)
        self.shares = exact_shares(weights)
        """Groups of each dataset in one cycle."""
        if len(self.datasets) != len(self.shares):
            raise UserError(f"{len(self.datasets)} datasets cannot be mixed by {len(self.shares)} weights")
        first = self.datasets[0]
        for other in self.datasets[1:]:
            _check_alike(first, other)
        self.tolerance = max(dataset.tolerance for dataset in self.datasets)
        self.kind, self.context, self.folder = first.kind, first.context, first.folder
        self.classes, self._labels = _join_classes(self.datasets)
        self.folders = [dataset.folder for dataset in self.datasets]
        self.manifest = first.manifest | {"classes": self.classes}
        facts = [[dataset.fingerprint, share] for dataset, share in zip(self.datasets, self.shares, strict=True)]
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self.id_starts = np.cumsum([0] + [int(dataset.starts[-1]) for dataset in self.datasets])
        """First sample id of each dataset."""
        self._shard_starts = np.cumsum([0] + [len(dataset.sizes) for dataset in self.datasets])

    @property
    def counts(self) -> Ints:
        """Samples of each shard of each dataset."""
        return np.concatenate([dataset.counts for dataset in self.datasets])

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def ids(self, shards: Ints, members: Ints) -> Ints:
        """Sample ids of places, the shards of all datasets numbered through."""
        ids = np.empty(len(shards), dtype=np.int64)
        for number, here in self._split(shards, self._shard_starts):
            local = self.datasets[number].ids(shards[here] - self._shard_starts[number], members[here])
            ids[here] = self.id_starts[number] + local
        return ids

    def all_ids(self) -> Ints:
        """The ids of all samples, ascending."""
        pairs = zip(self.id_starts, self.datasets, strict=False)
        return np.concatenate([start + dataset.all_ids() for start, dataset in pairs])

    def labels(self) -> Ints:
        """Class numbers of all samples in id order, -1 where there is none: int64 (n,)."""
        found = [self._relabel(number, dataset.labels()) for number, dataset in enumerate(self.datasets)]
        return np.concatenate(found)

    def key(self, identity: int) -> str:
        """The key under which sample `identity` stands in its tar."""
        number = self._dataset(identity)
        return self.datasets[number].key(identity - int(self.id_starts[number]))

    def shard(self, identity: int) -> int:
        """The shard of a sample."""
        number = self._dataset(identity)
        local = self.datasets[number].shard(identity - int(self.id_starts[number]))
        return int(self._shard_starts[number]) + local

    def shard_name(self, identity: int) -> str:
        """The path or URL of the shard that holds sample `identity`."""
        number = self._dataset(identity)
        return self.datasets[number].shard_name(identity - int(self.id_starts[number]))

    def pictures(self, ids: Ints) -> tuple[list[bytes], Ints]:
        """Encoded pictures and labels; see `ShardedDataset.pictures`."""
        payloads: list[bytes] = [b""] * len(ids)
        labels = np.empty(len(ids), dtype=np.int64)
        for number, here in self._split(ids, self.id_starts):
            found, own = self.datasets[number].pictures(ids[here] - self.id_starts[number])
            labels[here] = self._relabel(number, own)
            for place, payload in zip(here.tolist(), found, strict=True):
                payloads[place] = payload
        return payloads, labels

    def image(self, identity: int) -> tuple[bytes, int]:
        """Encoded picture and label of a sample; raises `DamagedData` when it has no picture."""
        payloads, labels = self.pictures(np.array([identity], dtype=np.int64))
        return payloads[0], int(labels[0])

    def rows(self, ids: Ints) -> Ints:
        """Token ids of rows; see `ShardedDataset.rows`."""
        assert self.context is not None
        rows = np.empty((len(ids), self.context + 1), dtype=np.int64)
        for number, here in self._split(ids, self.id_starts):
            rows[here] = self.datasets[number].rows(ids[here] - self.id_starts[number])
        return rows

    def row(self, identity: int) -> Ints:
        """The `context + 1` token ids of a row: int64 (context + 1,)."""
        return self.rows(np.array([identity], dtype=np.int64))[0]

    def split(self, validation: float) -> tuple[Mixture, Mixture]:
        """Two mixtures, (train, validation), each dataset split by its samples' keys."""
        train, valid = zip(*(dataset.split(validation) for dataset in self.datasets), strict=True)
        return Mixture(train, self.shares), Mixture(valid, self.shares)

    def stream(self, seed: int, lanes: int = 1, shuffle_samples: int = BLOCK_SAMPLES) -> SampleStream:
        """The mixture's samples by position; each dataset mixes `shuffle_samples` of its own."""
        seeds = hash64(seed, _DATASET, np.arange(len(self.datasets), dtype=np.int64)).astype(np.int64)
        streams = [d.stream(int(s), lanes, shuffle_samples) for d, s in zip(self.datasets, seeds, strict=True)]
        return _Mixed(streams, self.id_starts, Cycle(self.shares, seed), lanes)

    def copy(self) -> Mixture:
        """The same mixture with readers of its own, for another thread."""
        return Mixture([dataset.copy() for dataset in self.datasets], self.shares)

    def _dataset(self, identity: int) -> int:
        return int(np.searchsorted(self.id_starts, identity, side="right")) - 1

    def _relabel(self, number: int, labels: Ints) -> Ints:
        table = self._labels[number]
        return labels if table is None else np.where(labels >= 0, table[np.minimum(labels, len(table) - 1)], -1)

    def _split(self, values: Ints, starts: NDArray[np.int64]) -> list[tuple[int, Ints]]:
        """The places of each dataset that occurs."""
        numbers = np.searchsorted(starts, values, side="right") - 1
        return [(int(number), np.flatnonzero(numbers == number)) for number in np.unique(numbers)]


Samples = ShardedDataset | Mixture


def open_samples(source: str | Path | Sequence[str] | Mapping[str, float], **arguments: Any) -> Samples:
    """A dataset, or the mixture of several that a mapping from each one's folder or glob to its weight describes.

    Args:
        arguments: of `ShardedDataset`: `context`, `kind`, `tolerance`.

    Raises:
        UserError: see `ShardedDataset` and `Mixture`.
    """
    if not isinstance(source, Mapping):
        return ShardedDataset(source, **arguments)
    datasets = [ShardedDataset(path, **arguments) for path in source]
    return datasets[0] if len(datasets) == 1 else Mixture(datasets, list(source.values()))


class _Mixed:
    """The streams of several datasets, taken from in turn."""

    def __init__(self, streams: list[SampleStream], id_starts: Ints, cycle: Cycle, lanes: int) -> None:
        self.streams, self.id_starts, self.cycle, self.lanes = streams, id_starts, cycle, lanes

    def locate(self, positions: Ints) -> tuple[Ints, Ints]:
        """See `SampleStream`."""
        where = np.asarray(positions, dtype=np.int64)
        datasets, ranks = self.cycle.locate(where // self.lanes)
        own = ranks * self.lanes + where % self.lanes
        epochs, ids = np.empty_like(where), np.empty_like(where)
        for number in np.unique(datasets):
            here = datasets == number
            epochs[here], local = self.streams[number].locate(own[here])
            ids[here] = self.id_starts[number] + local
        return epochs, ids

    def ahead(self, position: int, lanes: Sequence[int]) -> None:
        """See `SampleStream`."""
        for stream, share in zip(self.streams, self.cycle.shares.tolist(), strict=True):
            stream.ahead(position // (self.cycle.length * self.lanes) * share * self.lanes, lanes)


def _check_alike(first: ShardedDataset, other: ShardedDataset) -> None:
    if first.kind != other.kind:
        raise UserError(f"{first.folder} holds {first.kind} and {other.folder} {other.kind}; mix one kind only")
    differing = [
        name for name in ("vocab_size", "bos", "eos", "pad", "mask") if _fact(first, name) != _fact(other, name)
    ]
    if differing or _tokenizer(first) != _tokenizer(other):
        raise UserError(
            f"{first.folder} and {other.folder} were made with different tokenizers; "
            f"shard one again with --tokenizer {first.folder / 'tokenizer.json'}"
        )


def _fact(dataset: ShardedDataset, name: str) -> Any:
    return dataset.manifest.get(name)


def _tokenizer(dataset: ShardedDataset) -> bytes | None:
    file = dataset.folder / "tokenizer.json"
    return file.read_bytes() if dataset.kind == "text" and file.is_file() else None


def _join_classes(datasets: Sequence[ShardedDataset]) -> tuple[list[str], list[Ints | None]]:
    """All class names, and for each dataset the new number of each of its classes (None: as they are)."""
    if all(dataset.classes == datasets[0].classes for dataset in datasets):
        return datasets[0].classes, [None] * len(datasets)
    names = list(dict.fromkeys(name for dataset in datasets for name in dataset.classes))
    numbers: Mapping[str, int] = {name: number for number, name in enumerate(names)}
    # Numbers without names cannot be told apart from another dataset's: those samples count as unlabelled.
    return names, [np.array([numbers[name] for name in d.classes] or [-1], dtype=np.int64) for d in datasets]
