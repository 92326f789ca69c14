"""Tasks that ask about every token of a text or every pixel of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from finetune.entities import is_bio, spans
from finetune.targets import IGNORED, Floats, Target, cross_entropy, ratio


class Tags(Target):
    """One tag a word, read at its first token. Truth int64 (b, n), `IGNORED` elsewhere; decisions int64 (b, n)."""

    name = "tokens"
    dense = True

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self.bio = is_bio(classes)
        """Whether tags mark entities (B-X, I-X, O), which are then judged whole."""
        self.merit = "f1" if self.bio else "token_accuracy"

    def loss(self, outputs: Tensor, truth: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each word's first token."""
        return cross_entropy(outputs, truth, label_smoothing)

    def distribution(self, outputs: Tensor) -> Tensor:
        """Of tags, (b, n, tags)."""
        return outputs.float().softmax(dim=-1)

    def decision(self, said: Tensor) -> Tensor:
        return said.argmax(dim=-1)

    def likelihoods(self, said: Tensor, truth: Tensor) -> Tensor:
        return _of_truth(said, truth)

    def sums(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> Floats:
        """Words right and words; of entities (or, without entities, of each tag) found, named and present."""
        rows = []
        for said, true in zip(decided, truth, strict=True):
            here = true != IGNORED
            a, b = said[here].numpy(), true[here].numpy()
            rows.append(np.concatenate([[(a == b).sum(), len(b)], self._found(a, b)]))
        return np.stack(rows).astype(np.float64)

    def _found(self, said: np.ndarray, true: np.ndarray) -> np.ndarray:
        if self.bio:
            named, present = (spans([self.classes[i] for i in each]) for each in (said, true))
            return np.array([len(named & present), len(named), len(present)])
        count = self.outputs
        hits = np.bincount(true[said == true], minlength=count)
        return np.concatenate([hits, np.bincount(said, minlength=count), np.bincount(true, minlength=count)])

    def summed(self, sums: Floats) -> dict[str, Floats]:
        """`f1`, of whole entities where tags are BIO, else averaged over tags; and `token_accuracy`, of words."""
        hits, named, present = np.split(sums[..., 2:], 3, axis=-1)
        each, counted = ratio(2 * hits, named + present), named + present > 0
        f1 = ratio((each * counted).sum(axis=-1), counted.sum(axis=-1).astype(np.float64))
        return {"f1": f1, "token_accuracy": ratio(sums[..., 0], sums[..., 1])}

    def score(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
        found = self.summed(self.sums(decided, truth).sum(axis=0))
        return {name: float(value) for name, value in found.items()}

    def constant(self, truth: Sequence[Tensor]) -> Tensor:
        """The commonest tag, for as many tokens as the longest row has."""
        known = torch.cat([each[each != IGNORED] for each in truth])
        return known.bincount(minlength=self.outputs).argmax().expand(max(len(each) for each in truth))

    def predictions(self, decided: Tensor) -> list[dict[str, Any]]:
        """Tags of all tokens; the caller knows which begin a word."""
        return [{"tags": [self.classes[i] for i in row]} for row in decided.tolist()]


class Segmentation(Target):
    """A class a pixel. Truth int64 (b, size, size), `IGNORED` where unknown; decisions of the same shape.

    Pixels are those of the square that the encoder sees. The head reads patch tokens (b, h, w, d); its
    logits are enlarged bilinearly (the linear head of DINOv2, section 7.4).
    """

    name = "segmentation"
    dense = True
    merit = "miou"

    def __init__(self, classes: list[str], size: int) -> None:
        """`size`: side in pixels of the encoder's view."""
        self.classes, self.size = classes, size

    def enlarged(self, outputs: Tensor) -> Tensor:
        """Logits (b, h, w, classes) as (b, classes, size, size)."""
        logits = rearrange(outputs, "b h w c -> b c h w")
        return F.interpolate(logits, (self.size, self.size), mode="bilinear", align_corners=False)

    def loss(self, outputs: Tensor, truth: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each known pixel."""
        return cross_entropy(rearrange(self.enlarged(outputs), "b c h w -> b h w c"), truth, label_smoothing)

    def row_loss(self, outputs: Tensor, truth: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Cross-entropy of each patch, whose truth is its commonest class."""
        return cross_entropy(outputs, truth, label_smoothing)

    def distribution(self, outputs: Tensor) -> Tensor:
        """Of classes, (b, size, size, classes)."""
        return rearrange(self.enlarged(outputs.float()).softmax(dim=1), "b c h w -> b h w c")

    def decision(self, said: Tensor) -> Tensor:
        return said.argmax(dim=-1)

    def likelihoods(self, said: Tensor, truth: Tensor) -> Tensor:
        return _of_truth(said, truth)

    def sums(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> Floats:
        """Pixels right, said and present of each class: (n, 3 * classes)."""
        rows = []
        for said, true in zip(decided, truth, strict=True):
            known = true != IGNORED
            a, b = said[known].long(), true[known]
            each = [b[a == b].bincount(minlength=self.outputs)]
            each += [values.bincount(minlength=self.outputs) for values in (a, b)]
            rows.append(torch.cat(each).double().numpy())
        return np.stack(rows)

    def summed(self, sums: Floats) -> dict[str, Floats]:
        """`miou`, intersection over union averaged over the classes that are present or said anywhere, and
        `pixel_accuracy`."""
        hits, said, present = np.split(sums, 3, axis=-1)
        union = said + present - hits
        return {
            "miou": ratio(ratio(hits, union).sum(axis=-1), (union > 0).sum(axis=-1).astype(np.float64)),
            "pixel_accuracy": ratio(hits.sum(axis=-1), present.sum(axis=-1)),
        }

    def score(self, decided: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
        found = self.summed(self.sums(decided, truth).sum(axis=0))
        return {name: float(value) for name, value in found.items()}

    def constant(self, truth: Sequence[Tensor]) -> Tensor:
        counts = sum(each[each != IGNORED].bincount(minlength=self.outputs) for each in truth)
        assert isinstance(counts, Tensor)
        return counts.argmax().expand(self.size, self.size)

    def predictions(self, decided: Tensor) -> list[dict[str, Any]]:
        """The share of pixels of each class that occurs; masks are written from the decisions themselves."""
        found = []
        for mask in decided:
            counts = mask.flatten().bincount(minlength=self.outputs).double()
            shares = (counts / counts.sum()).tolist()
            found.append({"shares": {name: share for name, share in zip(self.classes, shares, strict=True) if share}})
        return found

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"size": self.size}


def _of_truth(said: Tensor, truth: Tensor) -> Tensor:
    """The entries (m,) of said (..., classes) that truth (...) names, where that is known."""
    named = said.gather(-1, truth.clamp_min(0)[..., None])[..., 0]
    return named[truth != IGNORED]
