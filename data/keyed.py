"""Random numbers that depend on a key and a name, and on nothing else.

Every sample carries a 64-bit key, a hash of (seed, epoch, sample id). Whatever is drawn for it (a crop,
a flip, a mask) is a pure function of that key and of the stream's name: the same bits on a CPU and on a
GPU, in any batch, on any process, before and after a restart. The generator is Philox4x32-10 (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3): the sample's key is the
cipher's key, the counter is (block number, 0, stream, 0).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors that hold unsigned 32-bit words.
        key: two such tensors; all six broadcast against each other.

    Returns:
        Four int64 tensors of 32 random bits each, in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Both factors are below 2**32; the product wraps in int64, but its 64 bits are the right ones.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@torch.compiler.assume_constant_result
def _stream_number(stream: str) -> int:
    """A 32-bit number for a stream's name; a constant to torch.compile, which cannot trace zlib."""
    return zlib.crc32(stream.encode())


def bits(keys: Tensor, stream: str, count: int) -> Tensor:
    """Random 32-bit words: int64 (b, count) in [0, 2**32), from int64 `keys` (b,) and the stream's name."""
    blocks = torch.arange(math.ceil(count / 4), device=keys.device)
    zero = torch.zeros((), dtype=torch.int64, device=keys.device)
    name = zero + _stream_number(stream)
    key = (keys[:, None] & _MASK, (keys[:, None] >> 32) & _MASK)
    words = torch.stack(philox((blocks[None], zero, name, zero), key), dim=-1)
    return words.reshape(len(keys), 4 * len(blocks))[:, :count]


def uniform(keys: Tensor, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers: float32 (b, *shape) in [0, 1), multiples of 2**-24, the same bits on every device."""
    words = bits(keys, stream, math.prod(shape))
    return ((words >> 8).to(torch.float32) * 2.0**-24).reshape(len(keys), *shape)


def permutation(keys: Tensor, stream: str, length: int) -> Tensor:
    """A random order of `length` things for each key: int64 (b, length)."""
    return torch.argsort(bits(keys, stream, length), dim=1, stable=True)


def hash64(*words: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """A 64-bit hash of integers or integer arrays that broadcast (SplitMix64's finaliser, chained).

    A bijection of the last word, so distinct last words never collide. Seeds and epochs are hashed, not
    added: epoch 1 of seed 1 has nothing to do with epoch 0 of seed 2.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = state ^ np.asarray(word, dtype=np.int64).astype(np.uint64)
            state = state + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def sample_keys(seed: int, epochs: int | NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The samples' keys: int64, broadcast over `epochs` and `ids`."""
    return hash64(seed, epochs, ids).astype(np.int64)


def hash_texts(seed: int, texts: Sequence[str]) -> NDArray[np.uint64]:
    """A 64-bit hash of each string: uint64 (n,); strings of one length are hashed together."""
    words = [_words(text) for text in texts]
    lengths = np.array([len(row) for row in words], dtype=np.int64)
    hashes = np.empty(len(texts), dtype=np.uint64)
    for length in np.unique(lengths):
        here = np.flatnonzero(lengths == length)
        hashes[here] = hash64(seed, *np.array([words[place] for place in here], dtype=np.int64).T)
    return hashes


def _words(text: str) -> list[int]:
    """A string as words of seven bytes, and its length."""
    payload = text.encode("utf-8", "surrogateescape")
    return [int.from_bytes(payload[i : i + 7], "little") for i in range(0, len(payload), 7)] + [len(payload)]
