"""Who sees whom in a packed row, and the kernel that computes it.

A `Sight` is made once a forward pass for each kind of layer, from the shape of the rows and the numbers of their
documents, and attends for every layer. Which one is made depends on the device and on the documents' lengths,
and changes nothing but speed:

- `Varlen` on CUDA in half precision: flash attention over the documents themselves, windows included.
- `Grouped` on a CPU where most documents have neighbours of their own length: such neighbours as rows of their own.
- `Split` on a CPU where documents are much shorter than rows: one document after the other.
- `Banded` on a CPU in layers with a window much shorter than the row: blocks of queries against neighbouring blocks.
- `Dense` everywhere else: scaled dot products, with one mask for all layers of a kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from pretrain.kernels import kernels

_SPLIT_GAIN = 0.6
"""`Split` is chosen where it computes at most this share of the scores that `Dense` does …"""
_SPLIT_LENGTH = 48
"""… and documents are this long on average: each costs a few calls of its own."""
GROUP = 2
"""`Grouped` is chosen where neighbours of one length are at least this many on average."""


class Rows(NamedTuple):
    """What attention has to know about a batch."""

    batch: int
    length: int
    documents: Tensor | None
    """(b, n): equal neighbours are one document; None where each row is one."""
    causal: bool
    """Whether tokens see only what is before them, and themselves."""
    reach: int | None
    """Most places that a token sees to either side; None for all."""
    dtype: torch.dtype
    """Of queries, keys and values."""
    device: torch.device


class Sight(Protocol):
    """One way to attend; q, k, v and the result are (b, n, h, d)."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def sight(rows: Rows) -> Sight:
    """The fastest sight for `rows`."""
    kind = kernels(rows.device)
    if kind == "cuda" and rows.dtype in (torch.float16, torch.bfloat16):
        # On another device such a step is only counted: as much memory, and the scores of whole rows.
        return varlen(rows) if rows.device.type == "cuda" else Dense(None, rows.causal)
    if kind == "cpu" and not torch.compiler.is_compiling():
        lengths = [] if rows.documents is None else run_lengths(rows.documents)
        worth = bool(lengths) and sum(length**2 for length in lengths) <= _SPLIT_GAIN * rows.batch * rows.length**2
        groups = [(length, len(list(same))) for length, same in groupby(lengths)] if worth else []
        if worth and GROUP * len(groups) <= len(lengths):
            return grouped(rows, groups)
        if rows.reach is not None and 4 * rows.reach < rows.length:
            return banded(rows)
        if worth and rows.reach is None and len(lengths) * _SPLIT_LENGTH <= rows.batch * rows.length:
            return Split(lengths, rows.causal)
    return dense(rows)


def run_lengths(documents: Tensor) -> list[int]:
    """Lengths of all documents of all rows (b, n), one row after the other."""
    return _starts(documents).diff().tolist()


def _starts(documents: Tensor) -> Tensor:
    """Where documents begin in the rows joined, and the end of the last: int64 (documents + 1,)."""
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 1), value=True)
    begins[:, -1] = False
    whole = F.pad(begins[:, :-1].flatten(), (0, 1), value=True)
    return whole.nonzero().flatten()


@dataclass
class Dense:
    """Every score of every row, then a mask."""

    mask: Tensor | None
    """bool (b or 1, 1, n, n), True where a query (row) may see a key (column)."""
    causal: bool
    """Use the kernel's own causal mask; only without `mask`."""
    numbers: Tensor | None = None
    """The mask as numbers to add, kept from the first layer on."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(x, "b n h d -> b h n d") for x in (q, k, v))
        if kernels(q.device) == "cpu" and q.dtype != torch.float32:
            out = plain(q, k, v, self.bias(q))
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal)
        return rearrange(out, "b h n d -> b n h d")

    def bias(self, q: Tensor) -> Tensor | None:
        """The mask as numbers to add, made at the first layer."""
        if self.mask is None and not self.causal:
            return None
        if self.numbers is None:
            n = q.shape[2]
            mask = self.mask if self.mask is not None else torch.ones(n, n, dtype=torch.bool).tril()
            self.numbers = to_bias(mask, q.dtype)
        return self.numbers


def dense(rows: Rows) -> Dense:
    """Without a mask where the rows need none."""
    n, device = rows.length, rows.device
    reach = rows.reach if rows.reach is not None else n
    if rows.documents is None and reach >= n - 1:
        return Dense(None, rows.causal)
    index = torch.arange(n, device=device)
    distance = index[:, None] - index[None, :]
    visible = distance >= 0 if rows.causal else torch.ones_like(distance, dtype=torch.bool)
    if reach < n - 1:
        visible = visible & (distance.abs() <= reach)
    mask = rearrange(visible, "n m -> 1 1 n m")
    if rows.documents is not None:
        mask = mask & (rows.documents[:, None, :, None] == rows.documents[:, None, None, :])
    return Dense(mask, False)


def to_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is True, minus infinity elsewhere."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, over the last two dimensions.

    On a CPU in bfloat16 several times as fast as torch's fused kernel (2.15), which spends its time on converting.
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if bias is not None:
        scores = scores.add_(bias)
    return torch.matmul(scores.softmax(dim=-1), v)


@dataclass
class Split:
    """Documents one by one, so that no score between two of them is computed."""

    lengths: list[int]
    causal: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b = q.shape[0]
        parts = [rearrange(x, "b n h d -> h (b n) d").split(self.lengths, dim=1) for x in (q, k, v)]
        longest = max(self.lengths)
        bias = to_bias(torch.ones(longest, longest, dtype=torch.bool).tril(), q.dtype) if self.causal else None
        out = [
            plain(q, k, v, None if bias is None else bias[:length, :length])
            for length, q, k, v in zip(self.lengths, *parts, strict=True)
        ]
        return rearrange(torch.cat(out, dim=1), "h (b n) d -> b n h d", b=b)


@dataclass
class Grouped:
    """Neighbouring documents of one length as a batch of rows: no score between two is computed, nothing is masked."""

    groups: list[tuple[int, int, Sight]]
    """Length, number of documents, and how these rows attend."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = [length * count for length, count, _ in self.groups]
        parts = [x.flatten(0, 1).split(sizes) for x in (q, k, v)]
        out = [
            attend(*(x.unflatten(0, (count, length)) for x in group)).flatten(0, 1)
            for (length, count, attend), *group in zip(self.groups, *parts, strict=True)
        ]
        return torch.cat(out).view(q.shape)


def grouped(rows: Rows, groups: list[tuple[int, int]]) -> Grouped:
    """From the length and the number of the documents of each group, in order."""
    alone = [rows._replace(batch=count, length=length, documents=None) for length, count in groups]
    return Grouped([(*group, sight(each)) for group, each in zip(groups, alone, strict=True)])


@dataclass
class Banded:
    """Blocks as long as the window reaches; each sees itself and the blocks beside it."""

    bias: Tensor
    """(b or 1, 1, blocks, block, keys): see `to_bias`."""
    block: int
    causal: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[1]
        q, k, v = (self._blocks(x) for x in (q, k, v))
        out = plain(q, self._beside(k), self._beside(v), self.bias)
        return rearrange(out, "b h m s d -> b (m s) h d")[:, :n]

    def _blocks(self, x: Tensor) -> Tensor:
        missing = -x.shape[1] % self.block
        x = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        return rearrange(x, "b (m s) h d -> b h m s d", s=self.block)

    def _beside(self, x: Tensor) -> Tensor:
        """(b, h, m, keys, d): each block with the one before it and, unless causal, the one behind."""
        around = [F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x]
        if not self.causal:
            around.append(F.pad(x, (0, 0, 0, 0, 0, 1))[:, :, 1:])
        return torch.cat(around, dim=3)


def banded(rows: Rows) -> Banded:
    """The blocks' masks, from windows, ends of rows and documents."""
    assert rows.reach is not None
    n, reach = rows.length, rows.reach
    block = max(reach, 1)
    blocks = -(-n // block)
    query = rearrange(torch.arange(blocks * block), "(m s) -> m s 1", s=block)
    sides = 2 if rows.causal else 3
    key = rearrange(torch.arange(blocks), "m -> m 1 1") * block + torch.arange(-block, (sides - 1) * block)
    distance = query - key
    visible = (distance.abs() <= reach) & (key >= 0) & (key < n)
    if rows.causal:
        visible = visible & (distance >= 0)
    visible = visible | (distance == 0)  # rows beyond the end see themselves, and are cut off
    mask = rearrange(visible, "m s t -> 1 1 m s t")
    if rows.documents is not None:
        padded = F.pad(rows.documents, (0, blocks * block - n), value=-1)
        seen = padded[:, key.clamp(0, blocks * block - 1)]
        same = rearrange(padded, "b (m s) -> b m s 1", s=block) == seen
        mask = mask & rearrange(same, "b m s t -> b 1 m s t")
    return Banded(to_bias(mask, rows.dtype), block, rows.causal)


@dataclass
class Varlen:
    """Flash attention over documents of any length (torch.nn.attention.varlen), for CUDA in half precision."""

    starts: Tensor
    """int32 (documents + 1,)."""
    longest: int
    """A bound on the documents' lengths: that of a row, which costs no look at the data."""
    window: tuple[int, int]
    """Places seen before and behind a token; -1 for all."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        b = q.shape[0]
        q, k, v = (rearrange(x, "b n h d -> (b n) h d") for x in (q, k, v))
        out = varlen_attn(q, k, v, self.starts, self.starts, self.longest, self.longest, window_size=self.window)
        assert isinstance(out, Tensor)
        return rearrange(out, "(b n) h d -> b n h d", b=b)


@torch.compiler.disable
def varlen(rows: Rows) -> Varlen:
    """The documents' bounds; outside of compiled graphs, since their number is the data's."""
    if rows.documents is None:
        starts = torch.arange(0, (rows.batch + 1) * rows.length, rows.length, device=rows.device)
    else:
        starts = _starts(rows.documents)
    reach = -1 if rows.reach is None else rows.reach
    return Varlen(starts.int(), rows.length, (reach, 0 if rows.causal else reach))
