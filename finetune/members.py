"""The models that are combined: loaded, told apart, and judged on the same labelled items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import UserError
from finetune.blend import check_classes
from finetune.compare import Judged
from finetune.model import TaskModel, load_model
from finetune.overlap import overlap
from finetune.samples import Samples
from finetune.settings import Settings
from finetune.targets import Classification
from finetune.tasks import Report, load_task, load_test, settle

EQUAL = 0.01
"""Share of validation items that the test set may hold, too, by chance."""
NEAR = 0.5
"""The same of items that only look alike; simple pictures, such as digits, often do."""
TOLD = 0.05
"""Share of items that look alike from which on it is told."""


@dataclass(frozen=True)
class Member:
    """A model with the name that stands for it in results."""

    name: str
    model: TaskModel
    folder: Path | None = None
    """Where it was loaded from."""


Source = str | Path | Member


def load_members(sources: Sequence[Source], least: int = 1) -> list[Member]:
    """Load models of the same kind of input and the same classes (in whatever order).

    Raises:
        UserError: fewer than `least`, a folder that is no model, or models that do not fit together.
    """
    if len(sources) < least:
        raise UserError(f"{len(sources)} model was given, and combining takes {least} or more")
    members = [s if isinstance(s, Member) else Member(str(s), load_model(s), Path(s).expanduser()) for s in sources]
    first = members[0]
    for member in members:
        if not isinstance(member.model.target, Classification):
            raise UserError(f"{member.name} is for {member.model.target.name}; only classifications are combined")
    for other in members[1:]:
        if first.model.encoder.kind != other.model.encoder.kind:
            raise UserError(
                f"{first.name} reads {first.model.encoder.kind} and {other.name} {other.model.encoder.kind}; "
                "combine models of one kind"
            )
        check_classes(first.model, other.model, (first.name, other.name))
    return members


class LabelledData:
    """Labelled items, opened once for each way in which the members' encoders read them."""

    def __init__(self, source: str | Path, classes: list[str], report: Report) -> None:
        """Labels are numbered in the order of `classes`."""
        self.source, self.classes, self.report = source, classes, report
        self.fingerprint = ""
        self._opened: dict[object, Samples] = {}

    def samples(self, model: TaskModel) -> Samples:
        """The items as `model`'s encoder reads them, always in the same order."""
        encoder = model.encoder
        # Texts keep the encoder that made their tokens, so two tokenizers never share them.
        reading = vars(encoder).get("canvas") or vars(encoder)["tokenizer"].to_str() + f" {vars(encoder)['context']}"
        if reading not in self._opened:
            self._opened[reading] = self._open(model)
        return self._opened[reading]

    def judge(self, member: Member, settings: Settings) -> Judged:
        """What a member says about the items, its classes brought into the common order by name."""
        samples = self.samples(member.model)
        order = [member.model.classes.index(name) for name in self.classes]
        return Judged(member.name, member.model.probabilities(samples, settings).numpy()[:, order], samples.labels)

    def _open(self, model: TaskModel) -> Samples:
        samples, self.fingerprint = load_test(self.source, model.encoder, self.classes)
        settle(samples, self.report)
        return samples


class ValidationData(LabelledData):
    """Labelled items to choose on: none that a member was trained on, none that the result is judged on."""

    def __init__(self, source: str | Path, members: list[Member], report: Report) -> None:
        """Where `source` is what members were trained on and they held a share of it out, it is that share.

        Raises:
            UserError: members were trained on all of it.
        """
        super().__init__(source, members[0].model.classes, report)
        self.members = members

    def check_test(self, test: LabelledData) -> None:
        """Raises `UserError` where the result would be judged on what it was chosen on."""
        ours, theirs = (data.samples(self.members[0].model) for data in (self, test))
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
        held_out = load_task(self.source, None, model.encoder)
        order = np.array([self.classes.index(name) for name in held_out.classes], dtype=np.int64)
        held_out.test.labels = order[held_out.test.labels]
        settle(held_out.test, self.report)
        self.report(f"validation: the {len(held_out.test):,} samples of {self.source} that training held out")
        return held_out.test


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
