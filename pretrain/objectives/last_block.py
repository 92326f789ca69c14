"""The last block of a decoder that is looked at in some places only."""

from __future__ import annotations

from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional as F


class LastBlock(Block):
    """A pre-norm block of which only the last tokens are wanted: all are attended to, none but these are made.

    The same as those of timm's `Block`, without the part of its work that nobody looks at.
    """

    def __init__(self, width: int, heads: int, wanted: int) -> None:
        super().__init__(width, heads, qkv_bias=True)
        self.heads, self.wanted = heads, wanted

    def forward(self, x: Tensor) -> Tensor:
        """From (b, n, d) to (b, wanted, d)."""
        normed, width = self.norm1(x), x.shape[-1]
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        query = F.linear(normed[:, -self.wanted :], weight[:width], bias[:width])
        query = rearrange(query, "b n (h d) -> b h n d", h=self.heads)
        both = F.linear(normed, weight[width:], bias[width:])
        key, value = rearrange(both, "b n (two h d) -> two b h n d", two=2, h=self.heads).unbind(0)
        seen = rearrange(F.scaled_dot_product_attention(query, key, value), "b h n d -> b n (h d)")
        x = x[:, -self.wanted :] + self.attn.proj(seen)
        return x + self.mlp(self.norm2(x))
