"""A training step of the language objectives beside transformers' models: same parameters, batch, context, precision.

    python tests/bench/language.py [--precision no|bf16] [--rounds 5] [--preset cpu|gpt2] [--compile] [--kernels]

Next-token steps are compared on full rows of one document (as GPT-2 and Llama take them); masked steps on documents of
realistic lengths (log-normal, of which half are shorter than a third of the context), which ours packs into rows and
transformers' models pad to the longest of a batch. All run forward, backward and AdamW, interleaved, in one process on
all threads that torch has (set OMP_NUM_THREADS); the median round counts. Tokens/s are of real tokens alone. MFU is
6 FLOP a parameter that multiplies (and 12 a score's width a token and layer) over the ceiling of square matrix products
measured in the same run. `--compile` compiles every model. One thread on a CPU is timed by processor time, so that
other work on the machine counts less. `--kernels` also times attention by varlen, FlexAttention and SDPA, on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from data.batch import TextBatch
from data.keyed import sample_keys
from pretrain.encoders.attention import Rows, dense, sight
from pretrain.encoders.text import TextConfig, TextEncoder
from pretrain.objectives.masked_language import MaskedLanguage, MaskedLanguageConfig
from pretrain.objectives.next_token import NextToken, NextTokenConfig

CUDA = torch.cuda.is_available()
CLOCK = time.perf_counter if CUDA or torch.get_num_threads() > 1 else time.process_time
DEVICE = torch.device("cuda" if CUDA else "cpu")
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


@dataclass
class Shape:
    """What all models of a comparison share."""

    vocab: int
    width: int
    depth: int
    heads: int
    context: int
    batch: int
    masked_context: int
    """Most tokens of a document, and tokens of a packed row, of the masked comparison."""

    @property
    def gated(self) -> int:
        """Width inside a gated MLP with as many parameters as one of four times the width without a gate."""
        return int(self.width * 8 / 3) // 16 * 16


PRESETS = {
    "cpu": Shape(8192, 256, 6, 4, 256, 8, 512),
    "gpt2": Shape(50304, 768, 12, 12, 1024, 32, 1024),
}


@dataclass
class Contender:
    """One model's training step."""

    name: str
    model: nn.Module
    loss: Callable[[], Tensor]
    tokens: int
    """Real tokens of a step."""
    flops: float = 0.0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, precision: torch.dtype | None) -> float:
        """Seconds of one step."""
        began = CLOCK()
        with torch.autocast(DEVICE.type, precision) if precision else nullcontext():
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if CUDA:
            torch.cuda.synchronize()
        return CLOCK() - began


def next_token(shape: Shape) -> list[Contender]:
    """Ours, GPT-2 and Llama on full rows."""
    tokens = torch.randint(7, shape.vocab, (shape.batch, shape.context + 1), device=DEVICE)
    real = shape.batch * shape.context
    keys = torch.arange(shape.batch, device=DEVICE)
    ours = NextToken(encoder(shape, shape.context), NextTokenConfig(document_mask=False)).to(DEVICE)
    batch = TextBatch(tokens, torch.zeros_like(tokens), keys, keys)
    common: dict[str, Any] = {"attn_implementation": "sdpa", "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
    common |= {"vocab_size": shape.vocab}
    sizes = {"n_positions": shape.context, "n_embd": shape.width, "n_layer": shape.depth, "n_head": shape.heads}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drops, **common)).to(DEVICE)
    sizes = {"hidden_size": shape.width, "num_hidden_layers": shape.depth, "num_attention_heads": shape.heads}
    sizes |= {"intermediate_size": shape.gated, "max_position_embeddings": shape.context}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(tie_word_embeddings=True, **sizes, **common)).to(
        DEVICE
    )
    work = flops(ours, shape, real, shape.context / 2)
    seen, targets = tokens[:, :-1], tokens[:, 1:]
    return [
        Contender("ours", ours, lambda: mean(ours, batch), real, work),
        Contender("transformers GPT-2, sdpa", gpt2, lambda: foreign(gpt2, seen, targets), real),
        Contender("transformers Llama, sdpa", llama, lambda: foreign(llama, seen, targets), real),
    ]


def masked(shape: Shape) -> list[Contender]:
    """Ours on packed rows; ModernBERT and BERT on the same documents, padded to the longest."""
    documents, rows = packed(shape)
    real = sum(map(len, documents))
    ids = np.arange(len(rows))
    keys = torch.from_numpy(sample_keys(0, 0, ids))
    batch = TextBatch(rows, (rows == 1).cumsum(1), keys, keys).to(DEVICE)
    config = MaskedLanguageConfig()
    ours = MaskedLanguage(encoder(shape, shape.masked_context, global_every=3), config).to(DEVICE)
    width = max(map(len, documents))
    tokens = torch.zeros(len(documents), width, dtype=torch.long)
    for place, document in enumerate(documents):
        tokens[place, : len(document)] = document
    attention = (tokens != 0).long().to(DEVICE)
    chosen = (torch.rand(tokens.shape) < config.mask_ratio) & (tokens > 6)
    seen, labels = torch.where(chosen, 3, tokens).to(DEVICE), torch.where(chosen, tokens, -100).to(DEVICE)
    common: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": shape.masked_context,
        "attn_implementation": "sdpa",
    }
    modern = transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            intermediate_size=shape.gated, global_attn_every_n_layers=3, reference_compile=False, **MARKS, **common
        )
    ).to(DEVICE)
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(
            intermediate_size=4 * shape.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
            **common,
        )
    ).to(DEVICE)

    def theirs(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: model(input_ids=seen, attention_mask=attention, labels=labels).loss

    seen_each = statistics.mean(len(d) for d in documents for _ in d)
    return [
        Contender("ours, packed", ours, lambda: mean(ours, batch), real, flops(ours, shape, real, seen_each)),
        Contender("transformers ModernBERT, sdpa, padded", modern, theirs(modern), real),
        Contender("transformers BERT, sdpa, padded", bert, theirs(bert), real),
    ]


def packed(shape: Shape) -> tuple[list[Tensor], Tensor]:
    """Documents of realistic lengths, and the rows they fill one after the other; both hold the same tokens."""
    generator = np.random.default_rng(0)
    room = shape.batch * shape.masked_context
    documents: list[Tensor] = []
    left = room
    while left > 2:
        length = int(np.clip(generator.lognormal(np.log(shape.masked_context / 3.5), 0.9), 8, shape.masked_context))
        length = min(length, left)
        body = torch.from_numpy(generator.integers(7, shape.vocab, max(length - 2, 0)))
        documents.append(torch.cat([torch.tensor([1]), body, torch.tensor([2])])[:length])
        left -= length
    stream = F.pad(torch.cat(documents), (0, left))
    rows = stream.view(shape.batch, shape.masked_context)
    return documents, torch.cat([rows, torch.zeros(shape.batch, 1, dtype=torch.long)], dim=1)


def encoder(shape: Shape, context: int, global_every: int = 1) -> TextEncoder:
    """Ours, with the parameters of a Llama of this shape."""
    return TextEncoder(
        TextConfig(
            vocab_size=shape.vocab,
            width=shape.width,
            depth=shape.depth,
            heads=shape.heads,
            intermediate_size=shape.gated,
            context=context,
            global_every=global_every,
        )
    )


def mean(objective: nn.Module, batch: TextBatch) -> Tensor:
    """Loss a target."""
    output = objective(batch, 0.5)
    return output.loss_sum / output.target_count


def foreign(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """As transformers' own loss, on targets that are already shifted."""
    logits = model(input_ids=tokens).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def flops(objective: nn.Module, shape: Shape, tokens: int, seen: float) -> float:
    """Model FLOPs of one step: matrices in both directions, scores that can be seen, and logits of targets."""
    matrices = sum(p.numel() for n, p in objective.named_parameters() if p.ndim == 2 and "tok_embeddings" not in n)
    share = objective.config.mask_ratio if isinstance(objective, MaskedLanguage) else 1.0
    return tokens * (6 * (matrices + share * shape.vocab * shape.width) + 12 * shape.depth * shape.width * seen)


def ceiling(precision: torch.dtype | None) -> float:
    """FLOP/s of a square matrix product, the best of some."""
    size = 8192 if CUDA else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=precision or torch.float32) for _ in range(2))
    best = 0.0
    for _ in range(12):
        began = CLOCK()
        torch.mm(a, b)
        if CUDA:
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (CLOCK() - began))
    return best


def table(
    title: str, contenders: list[Contender], precision: torch.dtype | None, rounds: int, compiled: bool = False
) -> None:
    """Interleaved rounds; a Markdown table of medians."""
    for contender in contenders:
        if compiled:
            contender.model.compile()
        contender.step(precision)
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    ceilings = []
    for _ in range(rounds):
        ceilings.append(ceiling(precision))
        for contender in contenders:
            seconds[contender.name].append(contender.step(precision))
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    best = max(c.tokens / medians[c.name] for c in contenders[1:])
    print(
        f"\n### {title}\n\n| step | M parameters | s a step | real tokens/s | ours / this | MFU |\n"
        "|---|---|---|---|---|---|"
    )
    mine = contenders[0].tokens / medians[contenders[0].name]
    for c in contenders:
        rate = c.tokens / medians[c.name]
        used = f"{c.flops / medians[c.name] / statistics.median(ceilings):.0%}" if c.flops else ""
        size = sum(p.numel() for p in c.model.parameters()) / 1e6
        print(f"| {c.name} | {size:.1f} | {medians[c.name]:.3f} | {rate:,.0f} | {mine / rate:.2f} | {used} |")
    print(
        f"\nOurs over the best of the others: {mine / best:.2f}. "
        f"Ceiling: {statistics.median(ceilings) / 1e9:,.0f} GFLOP/s."
    )


def kernels(shape: Shape) -> None:
    """Attention alone on packed rows, forward and backward, on a GPU in bf16, in three ways."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, rows = packed(shape)
    documents = (rows[:, :-1] == 1).cumsum(1).to(DEVICE)
    b, n, h, d = *documents.shape, shape.heads, shape.width // shape.heads
    q, k, v = (torch.randn(b, n, h, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    about = Rows(b, n, documents, True, None, torch.bfloat16, DEVICE)
    compiled = torch.compile(flex_attention)

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (documents[batch, i] == documents[batch, j])

    def flex() -> Tensor:
        mask = create_block_mask(visible, b, None, n, n, device="cuda")
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask)

    ways = {
        "varlen": lambda: sight(about)(q, k, v),
        "FlexAttention, compiled": flex,
        "SDPA with a mask": lambda: dense(about)(q, k, v),
    }
    print("\n### Attention kernels, masks included\n\n| kernel | ms forward and backward |\n|---|---|")
    for name, way in ways.items():
        times = []
        for _ in range(12):
            torch.cuda.synchronize()
            began = time.perf_counter()
            way().sum().backward()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        print(f"| {name} | {1e3 * statistics.median(times[2:]):.2f} |")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["no", "bf16", "both"], default="both")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--preset", choices=PRESETS, default="gpt2" if CUDA else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--kernels", action="store_true")
    given = parser.parse_args()
    shape = PRESETS[given.preset]
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} CPU threads"
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {where}; {shape}")
    for precision in ("no", "bf16") if given.precision == "both" else (given.precision,):
        dtype = torch.bfloat16 if precision == "bf16" else None
        label = ("bf16 autocast" if dtype else "float32") + (", compiled" if given.compile else "")
        title = f"Next-token step, {label}, {shape.batch} x {shape.context}"
        table(title, next_token(shape), dtype, given.rounds, given.compile)
        title = f"Masked step, {label}, documents of up to {shape.masked_context} tokens"
        table(title, masked(shape), dtype, given.rounds, given.compile)
    if given.kernels:
        if not CUDA:
            sys.exit("--kernels needs a CUDA device: varlen and FlexAttention's backward pass do not run on a CPU")
        kernels(shape)


if __name__ == "__main__":
    main()
