"""Encoders of text: our transformer, read from its ModernBERT layout, with its tokenizer."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from data.batch import TextBatch
from data.errors import UserError
from data.tokenizer import load, special_ids
from finetune.encoder import Augmentation, Encoder, Pooling
from finetune.packing import pack
from pretrain.encoders.modernbert import Loaded, from_modernbert, split_adapter, to_modernbert
from pretrain.encoders.text import TextEncoder

_LAYER = re.compile(r"layers\.(\d+)\.")


class DocumentEncoder(Encoder):
    """One vector a document, pooled over its tokens."""

    kind = "text"
    folder: Path

    def __init__(
        self, model: TextEncoder, folder: Path, info: dict[str, Any], pooling: Pooling, loaded: Loaded
    ) -> None:
        """`loaded` is what the folder held; its prediction head is kept so that `save` writes a whole model."""
        super().__init__()
        self.model, self.folder, self.info, self.pooling = model, folder, info, pooling
        self.loaded = loaded
        self.features = model.config.width
        self.context = model.config.context
        self.tokenizer = load(folder)
        marks = special_ids(self.tokenizer)
        self.bos, self.eos, self.pad = marks["bos"], marks["eos"], marks["pad"]
        self.before, self.behind = [self.bos], [self.eos]
        """Ids that stand before and behind every text."""

    @classmethod
    def load(cls, folder: Path, info: dict[str, Any], pooling: Pooling) -> Self:
        """An export of ours. Raises `UserError` when it is of another layout or its weights do not fit."""
        loaded = from_modernbert(folder)
        model = TextEncoder(loaded.config)
        try:
            model.load_state_dict(loaded.encoder)
        except RuntimeError as error:
            raise UserError(f"{folder} does not load as a text encoder: {error}") from None
        return cls(model, folder, info, pooling, loaded._replace(encoder={}))

    def tokenize(self, texts: list[str]) -> list[NDArray[np.int64]]:
        """Token ids of each text between begin and end marks, as in pre-training; cut at the context."""
        room = self._room
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array([*self.before, *e.ids[:room], *self.behind], dtype=np.int64) for e in encodings]

    def tokenize_words(self, words: list[str]) -> list[tuple[NDArray[np.int64], list[int]]]:
        """Rows of token ids of words with spaces between them, cut between words where the context is full.

        Returns:
            for each row its ids and the place of the first token of each of its words, -1 for a word that
            has no token.
        """
        text = " ".join(words)
        starts = np.cumsum([0, *(len(word) + 1 for word in words)])[:-1]
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        # A token belongs to the word that holds its last character: byte-level tokens begin with the space before.
        ends = np.array([end - 1 for _, end in encoded.offsets], dtype=np.int64)
        owner = np.searchsorted(starts, ends, side="right") - 1
        inside = ends < starts[owner] + np.array([len(word) for word in words])[owner] if len(ends) else ends
        return [self._row(encoded.ids, owner, inside, first, last) for first, last in self._pieces(owner, len(words))]

    @property
    def _room(self) -> int:
        """Tokens of a text that the context has room for."""
        return self.context - len(self.before) - len(self.behind)

    def _pieces(self, owner: NDArray[np.int64], words: int) -> list[tuple[int, int]]:
        """Ranges of words whose tokens fit into the context (a single longer word is cut)."""
        room, first, taken, found = self._room, 0, 0, []
        for word, tokens in enumerate(np.bincount(owner, minlength=words).tolist()):
            if taken and taken + tokens > room:
                found.append((first, word))
                first, taken = word, 0
            taken += tokens
        return [*found, (first, words)]

    def _row(
        self, ids: list[int], owner: NDArray[np.int64], inside: NDArray[Any], first: int, last: int
    ) -> tuple[NDArray[np.int64], list[int]]:
        here = np.flatnonzero((owner >= first) & (owner < last))[: self._room]
        row = np.array([*self.before, *(ids[i] for i in here), *self.behind], dtype=np.int64)
        places = [-1] * (last - first)
        for place, token in enumerate(here.tolist(), start=len(self.before)):
            word = int(owner[token]) - first
            if places[word] < 0 and inside[token]:
                places[word] = place
        return row, places

    def batch(self, rows: list[NDArray[np.int64]], keys: Tensor, ids: Tensor) -> TextBatch:
        """Rows of token ids, padded on the right: documents are 0 on real tokens and 1 on padding."""
        # Few distinct lengths keep allocators and compilers calm.
        length = max(len(row) for row in rows)
        length = max(length, min(-(-length // 8) * 8, self.context))
        tokens = torch.full((len(rows), length), self.pad)
        documents = torch.ones_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = torch.from_numpy(row)
            documents[i, : len(row)] = 0
        return TextBatch(tokens=tokens, documents=documents, keys=keys, ids=ids)

    def inputs(self, batch: TextBatch, augment: Augmentation | None = None) -> tuple[Tensor, ...]:
        """Tokens and documents, both int64 (b, n); text is not augmented."""
        return batch.tokens, batch.documents

    def tokens(self, *inputs: Tensor) -> Tensor:
        tokens, documents = inputs
        # Elsewhere a look at the lengths would make the device wait.
        packs = tokens.device.type == "cpu" and not self.one_a_row
        packed = pack(tokens, documents, self.pad) if packs else None
        if packed is not None:
            return packed.unpack(self.model(packed.tokens, packed.documents, causal=self.loaded.causal))
        full = packs and not documents.any()  # then there is nothing to hide
        hidden: Tensor = self.model(tokens, None if full else documents, causal=self.loaded.causal)
        return hidden

    def pool(self, *inputs: Tensor) -> Tensor:
        documents = inputs[1]
        hidden = self.tokens(*inputs)
        real = (documents == 0).to(hidden.dtype)
        if self.pooling == "last":
            last = rearrange(real.sum(dim=1).long() - 1, "b -> b 1 1").expand(-1, -1, hidden.shape[2])
            return rearrange(hidden.gather(1, last), "b 1 d -> b d")
        total = reduce(hidden * rearrange(real, "b n -> b n 1"), "b n d -> b d", "sum")
        return total / reduce(real, "b n -> b 1", "sum")

    def layers(self) -> tuple[dict[str, int], int]:
        """Embeddings at 0, layer i at i + 1, the final norm with the last layer."""
        found = {name: _LAYER.search(name) for name, _ in self.named_parameters()}
        last = max(int(match[1]) for match in found.values() if match) + 1
        depths = {name: int(match[1]) + 1 if match else last for name, match in found.items()}
        return depths | {name: 0 for name in found if "embed" in name}, last + 1

    def foreign_adapter(self, pattern: str, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
        """transformers' decoder has three matrices for our `Wqkv`; the encoder's names are ours."""
        if not self.loaded.causal:
            return pattern, tensors
        return pattern.replace("Wqkv", "[qkv]_proj"), split_adapter(tensors)

    def untrained(self) -> DocumentEncoder:
        model = TextEncoder(self.model.config)
        return DocumentEncoder(model, self.folder, self.info, self.pooling, self.loaded)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"encoder.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state |= {f"head.{name}": tensor for name, tensor in self.loaded.head.items()}
        special = special_ids(self.tokenizer)
        config, tensors = to_modernbert(state, self.model.config, special, self.loaded.causal)
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
