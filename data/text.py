"""Documents -> blocks of token ids -> shards."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from data import tokenizer as tokenizers_room
from data.blocks import Sharding, Side
from data.documents import DocumentUnit, ReadCounts, find_text, read_documents
from data.errors import UserError
from data.shards import DatasetWriter, check_free

__all__ = ["read_documents", "shard_text"]

CHARACTERS = "characters"
"""Stands for a tokenizer of single characters where a path would name another."""
SAMPLE_BYTES = 2**25
"""Most text that a tokenizer is trained on (32 MiB); merges change little beyond that."""
_BATCH_CHARACTERS = 2**20
_WORD_END = re.compile(r"(?<=\w)(?=[ \n])")


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
) -> dict[str, Any]:
    """Tokenise text into the dataset `out`, with a `validation` share of the documents in `out/validation`.

    Trains a tokenizer of `vocab_size` on a bounded sample of the documents, or takes the one at `tokenizer`;
    `tokenizer="characters"` makes every character of the documents a token.
    Each document becomes `<|bos|> tokens <|eos|>`; a hash of its text decides its side, so equal documents
    stay together (and those equal to the first one always train). Memory holds one shard's open block, one
    batch of texts and one document at a time. `out` appears only when all of it is written.

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
        encoder = tokenizers_room.train_characters(read_documents(sources, document, field))
    elif tokenizer is not None:
        encoder = tokenizers_room.load(tokenizer)
    else:
        with tqdm(total=source_bytes, **_bar("training the tokenizer", progress)) as bar:
            documents = read_documents(sources, document, field, advance=bar.update)
            sample = training_sample(documents, SAMPLE_BYTES / max(source_bytes, 1))
            encoder = tokenizers_room.train(sample, vocab_size)
    density = _density(encoder, sources, document, field)
    sharding = Sharding(encoder, block_tokens, tokens_per_shard, density * source_bytes)
    counts = ReadCounts()
    with (
        DatasetWriter(out, "text", tokens_per_shard, overwrite) as writer,
        tqdm(total=source_bytes, **_bar("tokenising", progress)) as bar,
    ):
        documents = read_documents(sources, document, field, counts, bar.update)
        sides = _write_sides(_encoded(encoder, documents), writer, sharding, validation)
    total, valid = sides[0], sides[1] if len(sides) > 1 else None
    return total | {
        "vocab_size": encoder.get_vocab_size(),
        "bytes_per_token": total["bytes"] / total["tokens"],
        "replaced": counts.replaced,
        "empty": counts.empty,
        "validation": valid,
    }


def _write_sides(
    documents: Iterable[tuple[str, list[int]]], writer: DatasetWriter, sharding: Sharding, validation: float
) -> list[dict[str, Any]]:
    """Send each (text, ids) to its side by content hash; the counts of training and, if any, validation."""
    train, held_out = Side(writer, sharding, 1 - validation), None
    threshold, first = int(validation * 2**64), None
    with ExitStack() as stack:
        for text, ids in documents:
            content = hashlib.blake2b(text.encode(), digest_size=8).digest()
            first = first or content
            if content == first or int.from_bytes(content, "little") >= threshold:
                train.add(text, ids)
                continue
            if held_out is None:
                # Inside the unfinished dataset, so that both sides appear in one rename.
                folder = writer.folder / "validation"
                inner = stack.enter_context(DatasetWriter(folder, "text", writer.samples_per_shard))
                held_out = Side(inner, sharding, validation)
            held_out.add(text, ids)
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


def _density(encoder: Tokenizer, sources: Sequence[str | Path], document: DocumentUnit, field: str) -> float:
    """Tokens for each byte of the source files, from their first documents."""
    counts, tokens, size = ReadCounts(), 0, 0
    for text in read_documents(sources, document, field, counts):
        head = text[:_BATCH_CHARACTERS]
        tokens += 2 + len(encoder.encode(head, add_special_tokens=False))
        size += len(head.encode())
        if size >= _BATCH_CHARACTERS // 4:
            break
    return tokens / max(size, counts.bytes_read if len(head) == len(text) else 0)


def _check(validation: float, tokens_per_shard: int, block_tokens: int) -> None:
    if not 0 <= validation < 1:
        raise UserError(f"a validation share of {validation} is not in [0, 1); give the share of documents to hold out")
    if block_tokens < 2 or tokens_per_shard < block_tokens:
        raise UserError(f"{tokens_per_shard} tokens a shard do not hold one block of {block_tokens}; use larger shards")


def _bar(title: str, progress: bool) -> dict[str, Any]:
    # disable=None: drawn on a terminal only.
    return {"desc": title, "unit": "B", "unit_scale": True, "disable": None if progress else True}


def split_exactly(text: str, size: int = _BATCH_CHARACTERS) -> Iterator[str]:
    """Pieces of about `size` characters, cut where a word ends and white space begins.

    The byte-level pre-tokenizer always cuts there and looks only forward, so the pieces' ids joined are the
    whole text's ids; a huge document need not be encoded at once.
    """
    start = 0
    while len(text) - start > size:
        cut = _WORD_END.search(text, start + size)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _encoded(encoder: Tokenizer, documents: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """(text, ids) of each document, encoded many at a time."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        if len(text) > _BATCH_CHARACTERS:
            yield from _encode(encoder, batch)
            batch, characters = [], 0
            yield (
                text,
                [i for piece in split_exactly(text) for i in encoder.encode(piece, add_special_tokens=False).ids],
            )
            continue
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= 4096:
            yield from _encode(encoder, batch)
            batch, characters = [], 0
    yield from _encode(encoder, batch)


def _encode(encoder: Tokenizer, batch: list[str]) -> Iterator[tuple[str, list[int]]]:
    encodings = encoder.encode_batch_fast(batch, add_special_tokens=False)
    return ((text, encoding.ids) for text, encoding in zip(batch, encodings, strict=True))
