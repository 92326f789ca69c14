"""Text from a next-token model, one sampled token after another."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from data.tokenizer import SPECIAL_TOKENS, special_ids
from pretrain.objectives.next_token import NextToken


@torch.no_grad()
def generate(
    objective: NextToken,
    tokenizer: Tokenizer,
    prompt: str,
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """`prompt` continued by up to `tokens` tokens; ends early where the model ends the document.

    The same arguments give the same text. `temperature` 0 takes the likeliest token, `top_k` 0 keeps all.
    Every step reads the last `context` tokens anew: simple, and right for short samples; for long ones load
    the export into transformers, which caches keys and values.
    """
    special = special_ids(tokenizer)
    banned = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS if token != "<|eos|>"]
    banned = [token for token in banned if token is not None]
    device = next(objective.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    row = [special["bos"], *tokenizer.encode(prompt, add_special_tokens=False).ids]
    training = objective.training
    objective.eval()
    for _ in range(tokens):
        window = torch.tensor([row[-objective.encoder.config.context :]], device=device)
        scores = objective.logits(window, last=1)[0, 0].float().cpu()
        scores[banned] = -torch.inf
        scores[tokenizer.get_vocab_size() :] = -torch.inf
        token = _choose(scores, temperature, top_k, generator)
        if token == special["eos"]:
            break
        row.append(token)
    objective.train(training)
    return tokenizer.decode(row[1:], skip_special_tokens=False)


def _choose(scores: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(scores.argmax())
    if 0 < top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(top_k).values[-1], -torch.inf)
    return int(torch.multinomial((scores / temperature).softmax(dim=0), 1, generator=generator))
