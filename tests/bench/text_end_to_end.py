"""English text, end to end: bits per byte against a bigram model, and what pre-training gives SST-2.

    python tests/bench/text_end_to_end.py TEXT_FOLDER WORK_FOLDER [key=value …]

TEXT_FOLDER holds `general`, `reviews`, `heldout` and `sst2`. Shards `general` and `reviews`, pre-trains
`next_token_small` (resuming if the work folder has a run), prints bits per byte on `heldout` beside an
interpolated Kneser-Ney bigram model over the same tokens, then fine-tunes on SST-2 beside the same model from
scratch and a bag of tokens. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from data.dataset import ShardedDataset
from data.loader import sequential
from data.text import shard_text
from data.tokenizer import load, token_bytes
from finetune.controls import BagOfTokens
from finetune.encoder import load_encoder
from finetune.run import finetune
from finetune.tasks import load_task
from finetune.text_encoder import DocumentEncoder
from pretrain.loop import train
from pretrain.objectives.next_token import NextToken
from pretrain.recipe_file import load_recipe
from pretrain.reload import load_objective
from pretrain.text_metrics import KneserNeyBigram, bits_per_byte

BUDGETS = {None: 1, 50: 3}
"""Labels a class (None: all) and how many draws of them."""


def main(source: Path, work: Path, settings: list[str]) -> None:
    """Run the stages that are still missing and print the result."""
    shards, heldout = work / "shards", work / "heldout"
    if not shards.exists():
        shard_text([source / "general", source / "reviews"], shards, vocab_size=4096, validation=0.01)
    if not heldout.exists():
        shard_text([source / "heldout"], heldout, tokenizer=shards, validation=0.0)
    began = time.monotonic()
    recipe = load_recipe("next_token_small", [f"data.train={shards}", *settings])
    export = train(recipe, work / "run")
    result: dict = {"recipe": recipe.name, "settings": settings, "minutes": round((time.monotonic() - began) / 60, 1)}
    result["bits per byte on heldout"] = held_out(export, shards, heldout)
    print(json.dumps(result, indent=1))
    result["SST-2 test accuracy"] = sentiment(export, source / "sst2")
    print(json.dumps(result, indent=1))


def held_out(export: Path, shards: Path, heldout: Path) -> dict[str, float]:
    """Model and bigram on the same targets."""
    objective, _ = load_objective(export)
    assert isinstance(objective, NextToken)
    context, lengths = objective.encoder.config.context, token_bytes(load(shards))
    train_set, test_set = ShardedDataset(shards, context=context), ShardedDataset(heldout, context=context)
    rows = [np.concatenate([batch.tokens.numpy() for batch in sequential(d, 256)]) for d in (train_set, test_set)]
    bigram = KneserNeyBigram(len(lengths)).fit([rows[0]], train_set.manifest["bos"])
    return {
        "next-token model": round(bits_per_byte(objective, sequential(test_set, 64), lengths), 4),
        "Kneser-Ney bigram": round(bigram.bits_per_byte([rows[1]], lengths), 4),
    }


def sentiment(export: Path, sst2: Path) -> dict[str, dict]:
    """Full fine-tuning against from scratch, several label budgets; a bag of tokens as a control."""
    encoder = load_encoder(export)
    assert isinstance(encoder, DocumentEncoder)
    task = load_task(sst2 / "train.tsv", sst2 / "test.tsv", encoder)
    found = {}
    for labels, seeds in BUDGETS.items():
        for name, features, strategy in (
            ("pre-trained, full", encoder, "full"),
            ("from scratch", encoder, "scratch"),
            ("pre-trained, linear", encoder, "linear"),
            ("bag of tokens, linear", BagOfTokens(encoder), "linear"),
        ):
            judged = finetune(features, task, strategy=strategy, labels_per_class=labels, seeds=range(seeds))
            key = f"{name}, {'all' if labels is None else 2 * labels} labels"
            found[key] = {"accuracy": round(judged["accuracy"], 4), "interval": judged["interval"]}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
