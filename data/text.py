"""Documents -> blocks of token ids -> shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tqdm import tqdm

from data import tokenizer as tokenizers_room
from data.blocks import Sharding, Side
from data.documents import DocumentUnit, ReadCounts, find_text, read_documents, read_pieces
from data.encoding import Encoded, encode, split_exactly
from data.errors import UserError
from data.shards import DatasetWriter, check_free

__all__ = ["read_documents", "shard_text", "split_exactly"]

CHARACTERS = "characters"
"""Stands for a tokenizer of single characters where a path would name another."""
SAMPLE_BYTES = 2**25
"""Most text that a tokenizer is trained on (32 MiB); merges change little beyond that."""
_SURVEYED = 2**18
_WORTH_WORKERS = 2**24
"""Source bytes from which on starting processes pays."""


def shard_text(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    vocab_size: int = 8192,
    tokenizer: str | Path | None = None,
    validation: float = 0.005,
    tokens_per_shard: int = 2**21,
    block_tokens: int = 2**14,
    document: DocumentUnit = "file",
    field: str = "text",
    overwrite: bool = False,
    progress: bool = True,
    workers: int | None = None,
) -> dict[str, Any]:
    """Tokenise text into the dataset `out`, with a `validation` share of the documents in `out/validation`.

    Trains a tokenizer of `vocab_size` on a bounded sample of the documents, or takes the one at `tokenizer`;
    `tokenizer="characters"` makes every character of the documents a token.
    Each document becomes `<|bos|> tokens <|eos|>`; a hash of its text (of the first piece of a very long one)
    decides its side, so equal documents stay together (and those equal to the first one always train). `workers`
    processes tokenise (all cores by default, this process alone for a few megabytes); memory holds two batches of
    texts for each, whatever the size of the sources. `out` appears only when all of it is written.

    A shard holds `tokens_per_shard` tokens, or fewer (whole blocks) where the text would otherwise fill less
    than `MIXED_SHARDS` shards, judged by its bytes and the tokens a byte takes in the first documents.

    Returns a summary: `documents`, `tokens`, `bytes` (of text), `shards`, `vocab_size`, `bytes_per_token`,
    `replaced` and `empty` (see `ReadCounts`), and `validation`: the first four of that side, or None.
    Raises `UserError` for unusable sources, tokenizer or sizes, and where `out` exists without `overwrite`.
    """
    out = Path(out)
    _check(validation, tokens_per_shard, block_tokens)
    check_free(out, overwrite)
    source_bytes = sum(path.stat().st_size for path in find_text(sources))
    if tokenizer == CHARACTERS:
        encoder = tokenizers_room.train_characters(piece.text for piece in read_pieces(sources, document, field))
    elif tokenizer is not None:
        encoder = tokenizers_room.load(tokenizer)
    else:
        text_bytes = source_bytes * _survey(None, sources, document, field).expansion
        with tqdm(total=source_bytes, **_bar("training the tokenizer", progress)) as bar:
            documents = (piece.text for piece in read_pieces(sources, document, field, advance=bar.update))
            sample = training_sample(documents, SAMPLE_BYTES / max(text_bytes, 1))
            encoder = tokenizers_room.train(sample, vocab_size)
    density = _survey(encoder, sources, document, field).density
    sharding = Sharding(encoder, block_tokens, tokens_per_shard, density * source_bytes)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if source_bytes >= _WORTH_WORKERS else 1
    counts = ReadCounts()
    with (
        DatasetWriter(out, "text", tokens_per_shard, overwrite) as writer,
        tqdm(total=source_bytes, **_bar("tokenising", progress)) as bar,
    ):
        pieces = read_pieces(sources, document, field, counts, bar.update)
        sides = _write_sides(encode(encoder, pieces, workers), writer, sharding, validation)
    total, valid = sides[0], sides[1] if len(sides) > 1 else None
    return total | {
        "vocab_size": encoder.get_vocab_size(),
        "bytes_per_token": total["bytes"] / total["tokens"],
        "replaced": counts.replaced,
        "empty": counts.empty,
        "validation": valid,
    }


def _write_sides(
    documents: Iterable[Encoded], writer: DatasetWriter, sharding: Sharding, validation: float
) -> list[dict[str, Any]]:
    """Send each document to its side by content hash; the counts of training and, if any, validation."""
    train, held_out = Side(writer, sharding, 1 - validation), None
    threshold, first, side = int(validation * 2**64), None, train
    with ExitStack() as stack:
        for document in documents:
            if document.first:
                first = first or document.content
                hashed = int.from_bytes(document.content, "little")
                trains = document.content == first or hashed >= threshold
                if not trains and held_out is None:
                    # Inside the unfinished dataset, so that both sides appear in one rename.
                    folder = writer.folder / "validation"
                    inner = stack.enter_context(DatasetWriter(folder, "text", writer.samples_per_shard))
                    held_out = Side(inner, sharding, validation)
                side = train if trains or held_out is None else held_out
            side.add(document)
        return [side.finish() for side in (train, held_out) if side is not None]


def training_sample(documents: Iterable[str], share: float, limit: int = SAMPLE_BYTES) -> Iterator[str]:
    """About a `share` of the documents, chosen by content hash, cut off at `limit` bytes in all.

    The same documents give the same sample, and it is spread over all of them, not taken from the front.
    """
    used = 0
    for text in documents:
        raw = text.encode()
        chance = int.from_bytes(hashlib.blake2b(raw, digest_size=8, key=b"sample").digest(), "little")
        if used and chance >= share * 2**64:
            continue
        yield raw[: limit - used].decode(errors="ignore")
        used += len(raw)
        if used >= limit:
            return


class _Survey(NamedTuple):
    """What the first documents tell about the rest."""

    expansion: float
    """Bytes of text for each byte on disk."""
    density: float
    """Tokens for each byte on disk."""


def _survey(encoder: Tokenizer | None, sources: Sequence[str | Path], document: DocumentUnit, field: str) -> _Survey:
    """Read up to `_SURVEYED` bytes of the first documents; without an encoder the density is left at 0."""
    counts, tokens, size = ReadCounts(), 0, 0
    for piece in read_pieces(sources, document, field, counts):
        head = piece.text[:_SURVEYED]
        tokens += 2 + (len(encoder.encode(head, add_special_tokens=False)) if encoder else 0)
        size += len(head.encode())
        if size >= _SURVEYED:
            break
    # What is read ahead of a long or compressed document counts for less than its bytes.
    expansion = max(1.0, size / max(1, counts.bytes_read))
    return _Survey(expansion, tokens / max(1, size) * expansion)


def _check(validation: float, tokens_per_shard: int, block_tokens: int) -> None:
    if not 0 <= validation < 1:
        raise UserError(f"a validation share of {validation} is not in [0, 1); give the share of documents to hold out")
    if block_tokens < 2 or tokens_per_shard < block_tokens:
        raise UserError(f"{tokens_per_shard} tokens a shard do not hold one block of {block_tokens}; use larger shards")


def _bar(title: str, progress: bool) -> dict[str, Any]:
    # disable=None: drawn on a terminal only.
    return {"desc": title, "unit": "B", "unit_scale": True, "disable": None if progress else True}
