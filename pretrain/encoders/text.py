"""A transformer over token ids, laid out like ModernBERT (Warner et al. 2024), causal or not.

Rotary positions, GeGLU, bias-free pre-norms, local and global attention, packed documents. Parameter names
are those of transformers' `ModernBertModel`.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Self

import torch
from einops import rearrange
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.encoders.attention import Rows, Sight, sight


class TextConfig(BaseModel):
    """Shape of a `TextEncoder`."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["text"] = "text"
    vocab_size: int = Field(default=0, ge=0)
    """Rows of the embedding; 0 stands for the size of the dataset's tokenizer (filled in before building)."""
    width: int = Field(default=256, ge=2)
    """Length of a token's hidden vector."""
    depth: int = Field(default=6, ge=1)
    """Layers."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; `width / heads` must be even for rotary positions."""
    intermediate_size: int = Field(default=384, ge=1)
    """Width between the two matrices of an MLP; GeGLU holds it twice (Shazeer 2020)."""
    context: int = Field(default=512, ge=2)
    """Most tokens of a row."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies (Su et al. 2021), in global layers."""
    local_rope_theta: float | None = Field(default=None, gt=0)
    """The base in local layers; without it, as in global ones."""
    global_every: int = Field(default=1, ge=1)
    """Layers 0, n, 2n, … see the whole document, the others a window; 1 makes every layer global."""
    local_attention: int = Field(default=128, ge=2)
    """Window of local layers: up to half of it to either side; if causal, half of it, itself included."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in layer norms."""
    pad_token: int = Field(default=0, ge=0)
    """Id of the padding token, never a target."""

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of 2 * heads = {2 * self.heads}")
        return self

    def is_local(self, layer: int) -> bool:
        """Whether `layer` sees a window only."""
        return layer % self.global_every != 0


class View(NamedTuple):
    """What the layers of one kind need to know about a batch, made once a forward pass."""

    cos: Tensor
    """Of rotary angles, float32 (b or 1, n, 1, head_width / 2)."""
    sin: Tensor
    sight: Sight
    """Attends."""


def positions(documents: Tensor) -> Tensor:
    """Place of each token within its document, int64 (b, n), from document numbers (b, n).

    A document is a run of equal numbers; the count restarts at 0 with each.
    """
    index = torch.arange(documents.shape[1], device=documents.device)
    changes = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    starts = torch.where(changes, index, 0).cummax(dim=1).values
    return index - starts


def rotary(position: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (b, n, 1, head_width / 2), float32, for positions (b, n)."""
    exponents = torch.arange(0, head_width, 2, device=position.device, dtype=torch.float32) / head_width
    angles = rearrange(position, "b n -> b n 1 1").float() * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head's vector against each other, (b, n, h, d); float32 inside."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; rows of `Wqkv` are q, k, v."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.Wqkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.Wo = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, view: View) -> Tensor:
        qk, v = self.Wqkv(x).split([2 * x.shape[2], x.shape[2]], dim=-1)
        qk = rotate(rearrange(qk, "b n (two h d) -> b n (two h) d", two=2, h=self.heads), view.cos, view.sin)
        q, k = qk.chunk(2, dim=2)
        out = view.sight(q, k, rearrange(v, "b n (h d) -> b n h d", h=self.heads))
        return self.Wo(rearrange(out, "b n h d -> b n (h d)"))


class MLP(nn.Module):
    """GeGLU: `Wi` yields the activated half, then its multiplier."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.Wi = nn.Linear(config.width, 2 * config.intermediate_size, bias=False)
        self.Wo = nn.Linear(config.intermediate_size, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated, multiplier = self.Wi(x).chunk(2, dim=-1)
        return self.Wo(F.gelu(activated) * multiplier)


class Layer(nn.Module):
    """Attention and MLP, each behind its norm; the first layer reads the already normed embeddings."""

    def __init__(self, config: TextConfig, number: int) -> None:
        super().__init__()
        self.attn_norm = nn.Identity() if number == 0 else norm(config)
        self.attn = Attention(config)
        self.mlp_norm = norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, view: View) -> Tensor:
        x = x + self.attn(self.attn_norm(x), view)
        return x + self.mlp(self.mlp_norm(x))


class Embeddings(nn.Module):
    """Token vectors, normed."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.norm = norm(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.tok_embeddings(tokens))


class TextEncoder(nn.Module):
    """Token ids -> hidden vectors."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size is 0: set it to the size of the dataset's tokenizer before building")
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.depth))
        self.final_norm = norm(config)
        initialise(self, config.depth)

    def forward(self, tokens: Tensor, documents: Tensor | None = None, causal: bool = True) -> Tensor:
        """Hidden vectors (b, n, width) of token ids (b, n).

        `documents` (b, n) numbers the documents of each packed row: equal neighbours are one document, no
        token sees another document, and positions restart with each. Without it a row is one document.
        `causal` hides later tokens.
        """
        far = self._view(tokens, documents, causal, local=False)
        near = self._view(tokens, documents, causal, local=True) if self.config.global_every > 1 else far
        x = self.embeddings(tokens)
        for number, layer in enumerate(self.layers):
            x = layer(x, near if self.config.is_local(number) else far)
        return self.final_norm(x)

    def _view(self, tokens: Tensor, documents: Tensor | None, causal: bool, local: bool) -> View:
        config, (b, n) = self.config, tokens.shape
        theta = (config.local_rope_theta if local else None) or config.rope_theta
        position = torch.arange(n, device=tokens.device)[None] if documents is None else positions(documents)
        cos, sin = rotary(position, config.width // config.heads, theta)
        # The windows of transformers' models: |i - j| <= half for the encoder, i - j < half for the decoder.
        reach = config.local_attention // 2 - (1 if causal else 0) if local else None
        rows = Rows(b, n, documents, causal, reach, self._dtype(), tokens.device)
        return View(cos, sin, sight(rows))

    def _dtype(self) -> torch.dtype:
        """Of what matrix products yield here."""
        weight = self.final_norm.weight
        automatic = not weight.is_meta and torch.is_autocast_enabled(weight.device.type)
        return torch.get_autocast_dtype(weight.device.type) if automatic else weight.dtype


def norm(config: TextConfig) -> nn.LayerNorm:
    """Layer norm without bias."""
    return nn.LayerNorm(config.width, eps=config.norm_eps, bias=False)


def initialise(module: nn.Module, depth: int, std: float = 0.02) -> None:
    """Truncated normals; matrices into the residual stream are smaller by sqrt(2 * depth) (GPT-2)."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear | nn.Embedding):
            scale = std / math.sqrt(2 * depth) if name.endswith(("Wo", "dense")) else std
            nn.init.trunc_normal_(child.weight, std=scale, a=-2 * scale, b=2 * scale)
