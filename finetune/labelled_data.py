"""Labelled items that several models are judged on, whatever each reads them with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data.errors import UserError
from finetune.alignment import aligned, items_at_once, mean_of, ordered
from finetune.compare import Judged
from finetune.dense_samples import TagSamples
from finetune.features import accelerator_for, extract
from finetune.judge import Judgement
from finetune.members import Member
from finetune.model import TaskModel
from finetune.overlap import overlap
from finetune.reading import read
from finetune.samples import Ints, Samples
from finetune.settings import Settings
from finetune.tally import Tally
from finetune.tasks import Report, load_held_out, settle

EQUAL = 0.01
"""Share of validation items that the test set may hold, too, by chance."""
NEAR = 0.5
"""The same of items that only look alike; simple pictures, such as digits, often do."""
TOLD = 0.05
"""Share of items that look alike from which on it is told."""


class Part(NamedTuple):
    """What several models say of some items."""

    positions: Ints
    """(b,) of the items."""
    truth: Tensor
    """Of the items, where `each` lies."""
    each: Iterator[Tensor]
    """One `Target.distribution` a model, worked out as it is taken."""


class LabelledData:
    """Labelled items, opened once for each way in which the members' encoders read them."""

    def __init__(self, source: str | Path, reader: TaskModel, report: Report) -> None:
        """Judged are the classes of `reader` in its order, and words and pixels as it sees them."""
        self.source, self.reader, self.report = source, reader, report
        self.target = reader.target
        self.fingerprint = ""
        self.names: list[str] = []
        """Of the items: keys, paths or texts."""
        self._opened: dict[object, Samples] = {}

    def samples(self, model: TaskModel) -> Samples:
        """The items as `model`'s encoder reads them, always in the same order (of tagged text: its rows)."""
        encoder = model.encoder
        # Texts keep the encoder that made their tokens, so two tokenizers never share them.
        reading = vars(encoder).get("canvas") or vars(encoder)["tokenizer"].to_str() + f" {vars(encoder)['context']}"
        if reading not in self._opened:
            self._opened[reading] = self._open(model)
        return self._opened[reading]

    @property
    def common(self) -> Samples:
        """The items as they are judged."""
        return self.samples(self.reader)

    def said(self, members: Sequence[Member], settings: Settings) -> Iterator[Part]:
        """What members say of all items: at once, or, where every word or pixel is judged, batch by batch."""
        accelerator, common = accelerator_for(settings), self.common
        if not self.target.dense:
            positions = np.arange(len(common), dtype=np.int64)
            yield Part(positions, common.truth(positions), (self._pooled(each.model, settings) for each in members))
            return
        theirs = [self.samples(member.model) for member in members]
        size = items_at_once([self.reader, *(member.model for member in members)], settings.inference_batch)
        for positions in common.parts(size):
            each = (
                aligned(member.model, samples, common, positions, accelerator)
                for member, samples in zip(members, theirs, strict=True)
            )
            yield Part(positions, common.truth(positions).to(accelerator.device), each)

    def judge(self, member: Member, settings: Settings) -> Judged:
        """What one member says."""
        return self.judge_all([member], settings)[0]

    def judge_all(
        self, members: Sequence[Member], settings: Settings, weights: Sequence[float] | None = None
    ) -> list[Judged]:
        """What each member says and, where weights are given, last what their weighted mean does, the `ensemble`."""
        names = [member.name for member in members] + ["ensemble"] * (weights is not None)
        tallies = [Tally(self.target, len(self.common)) for _ in names]
        for positions, truth, each in self.said(members, settings):
            heard = _overheard(each, tallies, positions, truth)
            if weights is None:
                for _ in heard:
                    pass
            else:
                tallies[-1].add(positions, mean_of(weights, heard), truth)
        return [tally.judged(name) for tally, name in zip(tallies, names, strict=True)]

    def judgement(self, members: Sequence[Member], weights: Sequence[float], settings: Settings) -> Judgement:
        """Everything that the members' weighted mean decides."""
        tally = Tally(self.target, len(self.common), keep=True)
        for positions, truth, each in self.said(members, settings):
            tally.add(positions, mean_of(weights, each), truth)
        return tally.judgement()

    def _pooled(self, model: TaskModel, settings: Settings) -> Tensor:
        """float32 (n, outputs) on the CPU."""
        features = extract(model.encoder, self.samples(model), settings, accelerator_for(settings))
        return ordered(model.from_features(features), model.classes, self.target.classes)

    def _open(self, model: TaskModel) -> Samples:
        found = read(self.source, model.encoder, self.target.name, self.target)
        settle(found.samples, self.report)
        if not self._opened:
            self.fingerprint, self.names = found.fingerprint, found.names
        return found.samples


def _overheard(each: Iterator[Tensor], tallies: Sequence[Tally], positions: Ints, truth: Tensor) -> Iterator[Tensor]:
    """The same, counted in the first of `tallies` on the way."""
    for tally, said in zip(tallies, each, strict=False):
        tally.add(positions, said, truth)
        yield said


class ValidationData(LabelledData):
    """Labelled items to choose on: none that a member was trained on, none that the result is judged on."""

    def __init__(self, source: str | Path, members: list[Member], report: Report) -> None:
        """Where `source` is what members were trained on and they held a share of it out, it is that share.

        Raises:
            UserError: members were trained on all of it.
        """
        super().__init__(source, members[0].model, report)
        self.members = members

    def check_test(self, test: LabelledData) -> None:
        """Raises `UserError` where the result would be judged on what it was chosen on."""
        ours, theirs = (data.samples(self.reader) for data in (self, test))
        found = overlap(ours, theirs)  # of contents: fingerprints know names and sizes alone
        if found.equal > EQUAL or found.near > NEAR:
            share = 100 * max(found.equal, found.near)
            how = "are the same data" if found.equal == 1 else f"share {share:.0f} % of the first one's items"
            raise UserError(
                f"{self.source} and {test.source} {how}: what is chosen on the test set would look "
                "better than it is; give other validation data"
            )
        if found.near > TOLD:
            self.report(f"{100 * found.near:.0f} % of {self.source} look much like an item of {test.source}")

    def _open(self, model: TaskModel) -> Samples:
        samples = super()._open(model)
        trained = [results for results in map(_results, self.members) if _print(results, "train") == self.fingerprint]
        if not trained:
            return samples
        if not all(results["test"]["held_out"] for results in trained):
            raise UserError(f"the models were trained on {self.source}; give labelled data they have not seen")
        held_out = load_held_out(self.source, model.encoder, self.target)
        self._check_rows(held_out)
        settle(held_out, self.report)
        self.report(f"validation: the {len(held_out):,} samples of {self.source} that training held out")
        return held_out

    def _check_rows(self, held_out: Samples) -> None:
        """Raises `UserError` where tokenizers that cut texts differently held other texts out."""
        for other in self._opened.values():
            if not isinstance(other, TagSamples) or not isinstance(held_out, TagSamples):
                return
            if set(other.owners.tolist()) != set(held_out.owners.tolist()):
                raise UserError(
                    f"the models held other texts of {self.source} out, for their tokenizers cut them differently; "
                    "give labelled data they have not seen"
                )


def _results(member: Member) -> dict[str, Any]:
    """A member's results.json; {} where there is none that can be read."""
    try:
        found = json.loads((member.folder / "results.json").read_text()) if member.folder else {}
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _print(results: dict[str, Any], part: str) -> str | None:
    described = results.get(part)
    return described.get("fingerprint") if isinstance(described, dict) else None
