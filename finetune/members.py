"""The models that are combined: loaded, and found to fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from finetune.blend import check_classes
from finetune.model import TaskModel, load_model


@dataclass(frozen=True)
class Member:
    """A model with the name that stands for it in results."""

    name: str
    model: TaskModel
    folder: Path | None = None
    """Where it was loaded from."""


Source = str | Path | Member


def load_members(sources: Sequence[Source], least: int = 1) -> list[Member]:
    """Load models of the same kind of task and input, over the same classes (in whatever order).

    Raises:
        UserError: fewer than `least`, a folder that is no model, or models that do not fit together.
    """
    if len(sources) < least:
        raise UserError(f"{len(sources)} model was given, and combining takes {least} or more")
    members = [s if isinstance(s, Member) else Member(str(s), load_model(s), Path(s).expanduser()) for s in sources]
    check_fit(members)
    return members


def check_fit(members: Sequence[Member]) -> None:
    """Raises `UserError` for models of several kinds of task or input, or over other classes."""
    first = members[0]
    for other in members[1:]:
        kinds = [member.model.encoder.kind for member in (first, other)]
        if kinds[0] != kinds[1]:
            raise UserError(f"{first.name} reads {kinds[0]} and {other.name} {kinds[1]}; combine models of one kind")
        tasks = [member.model.target.name for member in (first, other)]
        if tasks[0] != tasks[1]:
            raise UserError(
                f"{first.name} is for {tasks[0]} and {other.name} for {tasks[1]}; combine models of one kind of task"
            )
        check_classes(first.model, other.model, (first.name, other.name))
