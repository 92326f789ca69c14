"""Token streams -> blocks of one length -> shards."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data.encoding import Encoded
from data.shards import DatasetWriter
from data.tokenizer import special_ids

MIXED_SHARDS = 16
"""Shards to aim for where the text is short: shuffling mixes whole shards, so it needs some to mix."""


@dataclass(frozen=True)
class Sharding:
    """What both sides of a dataset share."""

    tokenizer: Tokenizer
    block_tokens: int
    tokens_per_shard: int
    expected_tokens: float

    def blocks_per_shard(self, share: float) -> int:
        """Blocks of one shard of a side that gets `share` of the documents."""
        wanted = min(self.tokens_per_shard, self.expected_tokens * share / MIXED_SHARDS)
        return max(1, int(wanted / self.block_tokens))


class Side:
    """One side of the split: a token stream cut into blocks, blocks gathered into shards."""

    def __init__(self, writer: DatasetWriter, sharding: Sharding, share: float) -> None:
        self.writer, self.block_tokens = writer, sharding.block_tokens
        self.shard_tokens = sharding.blocks_per_shard(share) * sharding.block_tokens
        self.tokenizer = sharding.tokenizer
        self.special = special_ids(sharding.tokenizer)
        self.vocab_size = sharding.tokenizer.get_vocab_size()
        self.dtype = np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")
        self.pending: NDArray[Any] = np.empty(0, dtype=self.dtype)
        self.documents = self.tokens = self.bytes = self.blocks = self.shards = self.in_shard = 0

    def add(self, document: Encoded) -> None:
        """Append a document, or the next piece of one."""
        self.documents += document.first
        self.bytes += document.size
        bos, eos = [self.special["bos"]] * document.first, [self.special["eos"]] * document.last
        new = np.concatenate([bos, document.ids, eos]).astype(self.dtype)
        self.tokens += len(new)
        stream = np.concatenate([self.pending, new])
        whole = len(stream) // self.block_tokens * self.block_tokens
        for start in range(0, whole, self.block_tokens):
            self._write(stream[start : start + self.block_tokens])
        self.pending = stream[whole:]

    def finish(self) -> dict[str, Any]:
        """Write what is left and the manifest's fields; returns the side's counts."""
        if len(self.pending):
            self._write(self.pending)
        self._close()
        counts = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        about = {"dtype": self.dtype.str, "block_tokens": self.block_tokens, "vocab_size": self.vocab_size}
        self.writer.extra = about | self.special | counts
        self.writer.copy_file("tokenizer.json", self.tokenizer.to_str(pretty=True).encode())
        return counts | {"shards": self.shards}

    def _write(self, block: NDArray[Any]) -> None:
        file = io.BytesIO()
        np.lib.format.write_array(file, np.ascontiguousarray(block), version=(1, 0))
        self.writer.add(f"{self.blocks:08d}", {"npy": file.getvalue()})
        self.blocks += 1
        self.in_shard += len(block)
        if self.in_shard >= self.shard_tokens:
            self._close()

    def _close(self) -> None:
        if self.in_shard:
            self.writer.close_shard(tokens=self.in_shard)
            self.shards += 1
            self.in_shard = 0
