"""What a dataset holds, and whether it is whole."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.dataset import ShardedDataset
from data.duplicates import duplicates
from data.errors import DamagedData, UserError
from data.images import UnreadableImage, open_image

_SAMPLED = 200
_CONTEXTS = (256, 1024, 4096)


def inspect(source: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Counts, sizes, labels and problems of the shards at `source`.

    With `verify` the SHA-256 of every shard and index is compared with the manifest's (tars from elsewhere
    have none), and samples (of text: documents) that repeat another's bytes are counted. Some pictures are
    decoded in any case. Of text, `tail_at_context` is the share of tokens that rows of so many tokens leave out.

    Raises:
        UserError: the dataset cannot be opened at all.
    """
    dataset = ShardedDataset(source, context=1, tolerance=1)
    shards = dataset.manifest["shards"]
    report: dict[str, Any] = {
        "kind": dataset.kind,
        "shards": len(shards),
        "samples": sum(shard["samples"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "fingerprint": dataset.fingerprint,
    }
    problems: list[str] = []
    if dataset.kind == "text":
        facts = ("documents", "tokens", "vocab_size", "block_tokens")
        report |= {name: dataset.manifest[name] for name in facts}
        report["bytes_per_token"] = round(dataset.manifest["bytes"] / max(1, dataset.manifest["tokens"]), 3)
        report["tail_at_context"] = _tails(dataset)
    else:
        try:
            report |= _labels(dataset)
        except DamagedData as error:
            problems.append(str(error))
        report["pictures"] = _look(dataset, problems)
    if verify:
        problems += [sentence for shard in range(len(shards)) for sentence in dataset.storage.verify(shard)]
        try:
            report["duplicates"] = duplicates(dataset)
        except DamagedData as error:
            problems.append(str(error))
    return report | {"problems": list(dict.fromkeys(problems))}


def _labels(dataset: ShardedDataset) -> dict[str, Any]:
    """How many samples each class has, and how many have none."""
    labels = dataset.labels()
    names = dict(enumerate(dataset.classes)) or {int(n): str(n) for n in np.unique(labels[labels >= 0])}
    counts = {name: int((labels == number).sum()) for number, name in names.items()}
    return {"labels": counts, "unlabelled": int((labels < 0).sum())}


def _tails(dataset: ShardedDataset) -> dict[str, float]:
    """The share of tokens in no row, at some contexts for which there is a row at all."""
    longest = max(shard["tokens"] for shard in dataset.manifest["shards"])
    return {str(context): round(dataset.tail_at(context), 6) for context in _CONTEXTS if context < longest}


def _look(dataset: ShardedDataset, problems: list[str]) -> dict[str, Any]:
    """Sizes and formats of some pictures, spread over the dataset."""
    count = min(_SAMPLED, len(dataset))
    sides, formats = [], set()
    for identity in sorted(random.Random(0).sample(range(len(dataset)), count)):
        try:
            payload, _ = dataset.image(identity)
            image = open_image(payload)
        except UserError as error:
            problems.append(str(error))
            continue
        except UnreadableImage as error:
            where = dataset.paths[dataset.shard(identity)]
            problems.append(f"picture {dataset.key(identity)!r} in {where} cannot be decoded: {error}")
            continue
        sides.append(image.size)
        formats.add(str(Image.open(BytesIO(payload)).format))
    if not sides:
        return {"looked_at": count}
    widths, heights = np.array(sides).T
    return {
        "looked_at": count,
        "formats": sorted(formats),
        "median_size": [int(np.median(widths)), int(np.median(heights))],
        "largest_size": [int(widths.max()), int(heights.max())],
    }
