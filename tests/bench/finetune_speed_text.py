"""The contests on text: an export of ours, its ModernBERT layout read by transformers, the same texts and tokens.

- **features**: tokenise, encode and average over the real tokens. The other side is a plain loop over padded batches of
  transformers' model and tokenizer under `torch.inference_mode`, once in the order given and once from short to long,
  which is ours.
- **full**: a classifier on top, AdamW, cosine schedule. The other side is `AutoModelForSequenceClassification` with
  `Trainer`, dynamic padding by `DataCollatorWithPadding`; nothing is evaluated, saved or reported. The hidden layer of
  its prediction head is left out, so that both sides train encoder and linear classifier alone.

On a CPU ours lets short texts share rows, and joins those of a batch from short to long without any padding
(`finetune/packing.py`), where the others pad each to the batch's longest.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
from finetune_speed import Contest
from torch import Tensor, nn

from finetune.encoder import load_encoder
from finetune.features import accelerator_for, extract
from finetune.labelled_text import read_labelled_text
from finetune.samples import TextSamples
from finetune.settings import Settings
from finetune.text_encoder import DocumentEncoder
from finetune.train import Training

LR = 1e-4


class Transformers:
    """transformers alone."""

    def __init__(self, export: Path, texts: list[str], labels: list[int], batch: int, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        disable_progress_bar()
        set_verbosity_error()
        self.export, self.texts, self.labels, self.batch, self.folder = export, texts, labels, batch, folder
        self.tokenizer = AutoTokenizer.from_pretrained(export)
        self.encoder = AutoModel.from_pretrained(export).eval()

    def tokens(self) -> list[list[int]]:
        """Ids of each text, with marks, cut at the context."""
        ids: list[list[int]] = self.tokenizer(self.texts, truncation=True)["input_ids"]
        return ids

    def features(self, count: int) -> Tensor:
        """Of all texts, in batches as they come."""
        return self._features(self.tokens(), list(range(count)))

    def sorted_features(self, count: int) -> Tensor:
        """Of all texts, in batches from short to long."""
        tokens = self.tokens()
        return self._features(tokens, sorted(range(count), key=lambda i: len(tokens[i])))

    def _features(self, tokens: list[list[int]], order: list[int]) -> Tensor:
        found = torch.empty(len(order), self.encoder.config.hidden_size)
        with torch.inference_mode():
            for first in range(0, len(order), self.batch):
                places = order[first : first + self.batch]
                batch = self.tokenizer.pad({"input_ids": [tokens[i] for i in places]}, return_tensors="pt")
                real = batch["attention_mask"][..., None]
                found[places] = (self.encoder(**batch).last_hidden_state * real).sum(1) / real.sum(1)
        return found

    def train(self, steps: int) -> nn.Module:
        """A fit by the Trainer, its defaults kept."""
        from transformers import (
            AutoModelForSequenceClassification,
            DataCollatorWithPadding,
            PrinterCallback,
            Trainer,
            TrainingArguments,
        )

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        model = AutoModelForSequenceClassification.from_pretrained(self.export, num_labels=max(self.labels) + 1)
        model.head = nn.Identity()
        pairs = zip(self.tokens(), self.labels, strict=True)
        rows: list[dict[str, Any]] = [{"input_ids": ids, "label": label} for ids, label in pairs]
        settings = TrainingArguments(
            output_dir=str(self.folder),
            per_device_train_batch_size=self.batch,
            max_steps=steps,
            learning_rate=LR,
            weight_decay=0.05,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(0.1 * steps),
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model, settings, DataCollatorWithPadding(self.tokenizer), rows)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return model


class Ours:
    """This project."""

    def __init__(self, export: Path, texts: list[str], labels: list[int], batch: int) -> None:
        self.export, self.texts, self.labels, self.batch = export, texts, torch.tensor(labels).numpy(), batch
        self.model = self._start()

    def samples(self) -> TextSamples:
        """Tokenised anew."""
        return TextSamples(self.model.tokenize(self.texts), self.labels, self.model)

    def settings(self, steps: int = 1) -> Settings:
        """One rate, so many steps."""
        return Settings(
            cpu=True, lr=LR, min_steps=steps, epochs=1e-6, batch_size=self.batch, inference_batch=self.batch
        )

    def features(self, count: int) -> Tensor:
        """Of all texts, in order."""
        return extract(self.model, self.samples(), self.settings(), accelerator_for(self.settings()))

    def train(self, steps: int) -> nn.Module:
        """`full`."""
        samples, settings = self.samples(), self.settings(steps)
        classes = int(self.labels.max()) + 1
        training = Training(self._start, samples, classes, 0, settings, accelerator_for(settings))
        encoder, head, _ = training.fit((LR,))
        return nn.ModuleList([encoder, head])

    def _start(self) -> DocumentEncoder:
        encoder = load_encoder(self.export)
        assert isinstance(encoder, DocumentEncoder)
        encoder.requires_grad_(True)
        return encoder


def text_contests(arguments: argparse.Namespace, folder: Path) -> list[Contest]:
    """All three, on the first `arguments.samples` texts of the table."""
    found, batch = read_labelled_text(arguments.tsv), arguments.text_batch
    texts, names = found.texts[: arguments.samples], found.classes()
    labels = [names.index(str(label)) for label in found.labels[: arguments.samples]]
    ours = Ours(arguments.text_export, texts, labels, batch)
    theirs = Transformers(arguments.text_export, texts, labels, batch, folder / "trainer")
    count, plain = len(texts), "transformers' model, plain"
    return [
        Contest("text: features", plain, (ours.features, theirs.features), count),
        Contest("text: features", f"{plain}, sorted", (ours.features, theirs.sorted_features), count),
        Contest("text: full", "transformers' Trainer", (ours.train, theirs.train), arguments.steps, batch),
    ]
