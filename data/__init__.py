"""Raw files -> shards -> batches. Knows no objective."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.batch import ImageBatch, TextBatch
    from data.dataset import ShardedDataset
    from data.encoded import EncodedBatch, EncodedLoader
    from data.errors import UserError
    from data.loader import Loader, sequential
    from data.mixture import Mixture
    from data.shards import DatasetWriter

__all__ = [
    "DatasetWriter",
    "EncodedBatch",
    "EncodedLoader",
    "ImageBatch",
    "Loader",
    "Mixture",
    "ShardedDataset",
    "TextBatch",
    "UserError",
    "sequential",
]

_HOMES = {
    "DatasetWriter": "data.shards",
    "EncodedBatch": "data.encoded",
    "EncodedLoader": "data.encoded",
    "ImageBatch": "data.batch",
    "Loader": "data.loader",
    "Mixture": "data.mixture",
    "ShardedDataset": "data.dataset",
    "TextBatch": "data.batch",
    "UserError": "data.errors",
    "sequential": "data.loader",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line can ask for help without importing torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'data' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
