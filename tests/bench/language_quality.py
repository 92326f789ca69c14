"""What the language objectives learn: characters, masked words, sentiment, another domain.

    python tests/bench/language_quality.py TEXT_FOLDER WORK_FOLDER [STAGE …]

TEXT_FOLDER holds `general`, `reviews`, `heldout`, `sst2` and `tinyshakespeare.txt`. Stages, all of them by default:

- shakespeare   `shakespeare_char` on the first 90 %, held-out loss on the rest (nanoGPT's split and setting)
- mlm           `mlm_small` on general and reviews; masked tokens of `heldout` beside unigram and trigram models
- sentiment     SST-2 with 100, 1,000 and all labels: fine-tuned, from scratch, logistic regression on a bag of tokens
- domain        `mlm_small` on general alone, then continued on reviews: losses on both, SST-2 of either

Each run resumes and each finished stage is kept in WORK_FOLDER/results.json, so the command can be stopped and given
again. Prints Markdown tables.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.dataset import ShardedDataset
from data.loader import sequential
from data.text import shard_text
from data.tokenizer import load, special_ids
from finetune.controls import BagOfTokens
from finetune.encoder import load_encoder
from finetune.run import finetune
from finetune.tasks import load_task
from finetune.text_encoder import DocumentEncoder
from pretrain.export import exported_step
from pretrain.loop import train
from pretrain.objectives.masked_language import MaskedLanguage
from pretrain.precision import best
from pretrain.recipe_file import load_recipe
from pretrain.reload import load_objective
from pretrain.run import read_metrics

BUDGETS: dict[int | None, int] = {100: 5, 1000: 3, None: 2}
"""Labels in all (None: every one) and draws of them."""
TUNING: dict[str, Any] = {"min_steps": 200, "epochs": 4, "precision": best(torch.device("cpu"))}
"""Of all that is trained, pre-trained or not; either chooses its rate among three on an inner split of its labels."""
EVERY = 16
"""One token in so many is hidden, so that both its neighbours can be seen: by the trigram model, too."""
Ints = NDArray[np.int64]


def sharded(source: list[Path], out: Path, **settings: Any) -> Path:
    """Shards of `source`, made once."""
    if not out.exists():
        shard_text(source, out, progress=False, **settings)
    return out


def pretrained(recipe: str, run: Path, *settings: str) -> tuple[Path, float]:
    """A run's export and the processor seconds that this process spent on it: none where it has ended before."""
    chosen, began = load_recipe(recipe, list(settings)), time.process_time()
    if exported_step(run / "export") == chosen.train.steps:
        return run / "export", 0.0
    return train(chosen, run), time.process_time() - began


def shakespeare(text: Path, work: Path) -> dict[str, Any]:
    """Held-out loss of nanoGPT's setting for a CPU."""
    whole = (text / "tinyshakespeare.txt").read_bytes()
    cut = int(0.9 * len(whole))
    for name, part in (("train", whole[:cut]), ("held_out", whole[cut:])):
        (work / f"shakespeare_{name}.txt").write_bytes(part)
    data = sharded([work / "shakespeare_train.txt"], work / "shards/shakespeare", tokenizer="characters", validation=0)
    other = sharded([work / "shakespeare_held_out.txt"], work / "shards/held_out", tokenizer=data, validation=0)
    began = time.monotonic()
    settings = [f"data.train={data}", f"data.validation={other}"]
    _, processor = pretrained("shakespeare_char", work / "shakespeare", *settings)
    last = [line for line in read_metrics(work / "shakespeare") if "validation_loss" in line][-1]
    return {
        "held-out loss, nats a character": last["validation_loss"],
        "processor seconds": processor,
        "seconds on the clock": time.monotonic() - began,
    }


def english(text: Path, work: Path) -> Path:
    """Shards of general and reviews, whose tokenizer all stages share."""
    return sharded([text / "general", text / "reviews"], work / "shards/english", vocab_size=4096, validation=0.01)


def masked(text: Path, work: Path) -> dict[str, Any]:
    """Fill-mask against counts."""
    data = english(text, work)
    export, processor = pretrained("mlm_small", work / "mlm", f"data.train={data}")
    heldout = sharded([text / "heldout"], work / "shards/heldout", tokenizer=data, validation=0)
    return {"processor seconds of this call": processor} | fill_mask(export, data, heldout)


def rows_of(shards: Path, context: int) -> Ints:
    return np.concatenate([b.tokens.numpy() for b in sequential(ShardedDataset(shards, context=context), 256)])


def fill_mask(export: Path, data: Path, heldout: Path) -> dict[str, Any]:
    """Accuracy and nats of hidden tokens: the model, unigram and trigram models, and paired margins (95 %)."""
    objective, _ = load_objective(export)
    assert isinstance(objective, MaskedLanguage)
    context = objective.encoder.config.context
    tokenizer = load(data)
    counts = MiddleTrigram(tokenizer.get_vocab_size()).fit(rows_of(data, context))
    special = np.array(sorted(special_ids(tokenizer).values()))
    hits: dict[str, list[Ints]] = {"model": [], "unigram": [], "trigram": []}
    nats: dict[str, list[NDArray[np.float64]]] = {name: [] for name in hits}
    rows = rows_of(heldout, context)[:, :-1]
    for row in rows:
        places = np.arange(EVERY // 2, context - 1, EVERY)
        known = ~(np.isin(row[places], special) | np.isin(row[places - 1], special) | np.isin(row[places + 1], special))
        places = places[known]
        seen = torch.from_numpy(row.copy())[None]
        seen[0, places] = int(objective.table.mask)
        with torch.no_grad():
            logits = objective.logits(seen)[0, places].double().log_softmax(-1).numpy()
        truth = row[places]
        guesses = {"model": logits} | counts.log_probabilities(row[places - 1], row[places + 1])
        for name, scores in guesses.items():
            hits[name].append(scores.argmax(-1) == truth)
            nats[name].append(-scores[np.arange(len(truth)), truth])
    found: dict[str, Any] = {"hidden tokens": int(sum(map(len, nats["model"])))}
    for name in hits:
        found[name] = {
            "accuracy": float(np.concatenate(hits[name]).mean()),
            "nats": float(np.concatenate(nats[name]).mean()),
        }
    for name in ("unigram", "trigram"):
        gained = [float(a.sum()) - float(b.sum()) for a, b in zip(hits["model"], hits[name], strict=True)]
        saved = [float(b.sum() - a.sum()) for a, b in zip(nats["model"], nats[name], strict=True)]
        each = [len(row) for row in hits["model"]]
        found[f"margin over {name}"] = {"accuracy": _ratio(gained, each), "nats": _ratio(saved, each)}
    return found


def _ratio(sums: list[float], sizes: list[int]) -> list[float]:
    """Mean a token and its 95 % interval, rows resampled."""
    values, weights = np.array(sums), np.array(sizes)
    picks = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    draws = values[picks].sum(1) / weights[picks].sum(1)
    return [float(values.sum() / weights.sum()), *map(float, np.quantile(draws, [0.025, 0.975]))]


class MiddleTrigram:
    """P(token | its left and right neighbour), Witten-Bell back-off to the mean of both bigrams, then to unigrams."""

    def __init__(self, vocab_size: int) -> None:
        self.size = vocab_size

    def fit(self, rows: Ints) -> MiddleTrigram:
        """Count all neighbouring triples of rows (b, n)."""
        self.unigram = np.bincount(rows.ravel(), minlength=self.size) + 0.5
        self.unigram = self.unigram / self.unigram.sum()
        left, middle, right = rows[:, :-2].ravel(), rows[:, 1:-1].ravel(), rows[:, 2:].ravel()
        self.after = self._table(left, middle)
        self.before = self._table(right, middle)
        self.between = self._table(left * self.size + right, middle)
        return self

    def log_probabilities(self, left: Ints, right: Ints) -> dict[str, NDArray[np.float64]]:
        """Of every token in each place, float64 (places, vocabulary), by the unigram and by the trigram model."""
        out = np.empty((len(left), self.size))
        for place, (a, b) in enumerate(zip(left, right, strict=True)):
            bigrams = [self._mixed(t, k, self.unigram) for t, k in ((self.after, a), (self.before, b))]
            out[place] = self._mixed(self.between, a * self.size + b, (bigrams[0] + bigrams[1]) / 2)
        return {"unigram": np.tile(np.log(self.unigram), (len(left), 1)), "trigram": np.log(out)}

    def _table(self, given: Ints, token: Ints) -> dict[int, Counter[int]]:
        found: dict[int, Counter[int]] = {}
        for a, b in zip(given.tolist(), token.tolist(), strict=True):
            found.setdefault(a, Counter())[b] += 1
        return found

    def _mixed(self, table: dict[int, Counter[int]], key: int, lower: NDArray[np.float64]) -> NDArray[np.float64]:
        seen = table.get(int(key))
        if seen is None:
            return lower
        kinds, total = len(seen), seen.total()
        mixed = lower * kinds
        mixed[list(seen)] += np.fromiter(seen.values(), float)
        return mixed / (total + kinds)


def judged(
    export: Path, sst2: Path, names: dict[str, tuple[str, bool]], budgets: dict[int | None, int] = BUDGETS
) -> dict[str, Any]:
    """SST-2 test accuracy at every budget, for strategies by name (and whether of the bag of tokens)."""
    encoder = load_encoder(export)
    assert isinstance(encoder, DocumentEncoder)
    task = load_task(sst2 / "train.tsv", sst2 / "test.tsv", encoder)
    found = {}
    for labels, draws in budgets.items():
        for name, (strategy, bag) in names.items():
            source = BagOfTokens(encoder) if bag else encoder
            a_class = None if labels is None else labels // 2
            tuning = TUNING if strategy in ("full", "scratch") else {"precision": TUNING["precision"]}
            result = finetune(source, task, strategy=strategy, labels_per_class=a_class, seeds=range(draws), **tuning)
            key = f"{name}, {labels or 'all'} labels"
            found[key] = {"accuracy": result["accuracy"], "interval": result["interval"], "draws": draws}
            print(key, found[key], flush=True)
    return found


def sentiment(text: Path, work: Path) -> dict[str, Any]:
    """Pre-trained beside from scratch beside counting words."""
    return judged(
        work / "mlm" / "export",
        text / "sst2",
        {
            "pre-trained, full": ("full", False),
            "from scratch": ("scratch", False),
            "pre-trained, frozen, linear": ("linear", False),
            "bag of tokens, logistic regression": ("linear", True),
        },
    )


def domain(text: Path, work: Path) -> dict[str, Any]:
    """General, then reviews; what is gained there and forgotten here."""
    sides = {
        name: sharded([text / name], work / "shards" / name, tokenizer=english(text, work), validation=0.02)
        for name in ("general", "reviews")
    }
    watched = [f"data.watched={{{n}: {sides[n] / 'validation'}}}" for n in ("general", "reviews")]
    first, _ = pretrained(
        "mlm_small", work / "mlm_general", f"data.train={sides['general']}", "train.steps=2600", watched[1]
    )
    second, _ = pretrained(
        "mlm_small",
        work / "mlm_adapted",
        f"data.train={sides['reviews']}",
        f"start={first}",
        "train.steps=800",
        "optimizer.lr=1e-3",
        "watch.evaluate_every=200",
        watched[0],
    )
    found: dict[str, Any] = {}
    for name, export in (("general", first), ("general, then reviews", second)):
        found[name] = {
            side: fill_mask(export, sides["general"], shards / "validation")["model"] for side, shards in sides.items()
        }
        strategies = {f"{name}, full": ("full", False), f"{name}, linear": ("linear", False)}
        found |= judged(export, text / "sst2", strategies, {100: 5, 1000: 3})
    curve = [line for line in read_metrics(work / "mlm_adapted") if "general_loss" in line]
    found["forgetting"] = [{k: line[k] for k in ("step", "general_loss", "validation_loss")} for line in curve]
    return found


STAGES = {"shakespeare": shakespeare, "mlm": masked, "sentiment": sentiment, "domain": domain}


def main(text: Path, work: Path, stages: list[str]) -> None:
    """Run the stages that have no result yet and print all results."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for stage in stages or list(STAGES):
        if stage not in results:
            results[stage] = STAGES[stage](text, work)
            file.write_text(json.dumps(results, indent=1))
    for stage in stages or list(STAGES):
        print(f"\n## {stage}\n\n| what | value |\n|---|---|")
        for name, value in results[stage].items():
            shown = f"{value:.4f}" if isinstance(value, float) else json.dumps(value)
            print(f"| {name} | {shown} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
