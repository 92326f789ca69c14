"""Documents -> token ids, on as many cores as there are, in order and in bounded memory."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data.documents import Piece
from data.errors import UserError

BATCH_CHARACTERS = 2**20
_BATCH_PIECES = 4096
_WORD_END = re.compile(r"(?<=\w)(?=[ \n])")


class Encoded(NamedTuple):
    """A document, or a piece of a long one."""

    ids: NDArray[np.uint32]
    """Token ids, without special tokens."""
    size: int
    """Bytes of its text in UTF-8."""
    content: bytes
    """A hash of its text."""
    first: bool
    last: bool


def encode(tokenizer: Tokenizer, pieces: Iterable[Piece], workers: int = 1) -> Iterator[Encoded]:
    """Each piece's token ids, in order; the same for any number of workers.

    Memory holds two batches of a mebibyte of text for each worker process (1: this process alone).

    Raises:
        UserError: a worker process was killed, or could not start.
    """
    if workers <= 1:
        for batch in _batches(pieces):
            yield from _encode(tokenizer, batch)
        return
    with tempfile.TemporaryDirectory() as folder:
        # By way of a file: what starts a process must fit into a pipe, which one that dies at once never empties.
        description = Path(folder) / "tokenizer.json"
        description.write_text(tokenizer.to_str(), encoding="utf-8")
        yield from _by_workers(description, pieces, workers)


def _by_workers(description: Path, pieces: Iterable[Piece], workers: int) -> Iterator[Encoded]:
    waiting: deque[Future[list[Encoded]]] = deque()
    # Fresh processes: the tokenizers library's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (description,))
    try:
        for batch in _batches(pieces):
            waiting.append(pool.submit(_encode_here, batch))
            if len(waiting) >= 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a tokenising process was killed, perhaps for memory, or could not start; use fewer --workers "
            '(1: none but this one), and in a script of your own write `if __name__ == "__main__":` around the call'
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def split_exactly(text: str, size: int = BATCH_CHARACTERS) -> Iterator[str]:
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


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= _BATCH_PIECES:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, batch: list[Piece]) -> list[Encoded]:
    parts = [list(split_exactly(piece.text)) for piece in batch]
    encodings = iter(tokenizer.encode_batch_fast([p for part in parts for p in part], add_special_tokens=False))
    found = []
    for piece, part in zip(batch, parts, strict=True):
        ids = np.concatenate([np.array(next(encodings).ids, dtype=np.uint32) for _ in part])
        raw = piece.text.encode()
        content = hashlib.blake2b(raw, digest_size=8).digest()
        found.append(Encoded(ids, len(raw), content, piece.first, piece.last))
    return found


_worker: Any = None
"""The tokenizer of a worker process."""


def _begin(description: Path) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as cores are enough
    _worker = Tokenizer.from_str(description.read_text(encoding="utf-8"))
    _worker.encode_special_tokens = True  # not part of the description


def _encode_here(batch: list[Piece]) -> list[Encoded]:
    return _encode(_worker, batch)
