"""Texts that a next-token model writes while it trains, to be read beside its numbers."""

from __future__ import annotations

import json
from pathlib import Path

from data.tokenizer import load
from pretrain.generate import generate
from pretrain.objectives.hybrid import Hybrid
from pretrain.objectives.next_token import NextToken
from pretrain.setup import Setup

NAME = "samples.jsonl"


def write_samples(setup: Setup, folder: Path) -> list[str]:
    """Continue each of the recipe's `watch.prompts`, append them to `samples.jsonl` in `folder`, and return them.

    The main process alone writes; nothing of the training's random state is used. Other objectives than next-token
    prediction write nothing.
    """
    objective, watch, step = setup.state.objective, setup.recipe.watch, setup.state.step
    if isinstance(objective, Hybrid):
        objective = objective.causal_part
    if not watch.prompts or not setup.main or not isinstance(objective, NextToken):
        return []
    tokenizer = load(setup.data.train.folder)
    texts = [generate(objective, tokenizer, prompt, watch.sample_tokens, seed=step) for prompt in watch.prompts]
    with open(folder / NAME, "a", encoding="utf-8") as file:
        for prompt, text in zip(watch.prompts, texts, strict=True):
            file.write(json.dumps({"step": step, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n")
    return texts
