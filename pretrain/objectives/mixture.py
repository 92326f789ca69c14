"""Weighted mixtures of objectives over one shared encoder, such as MAE and SimCLR.

The loss is the weighted sum of the members' mean losses. Each sees the same samples and makes its own views; heads,
teachers and queues are its own, the encoder is one. Exact whatever the split of the batch where a member has as many
targets in every sample (all for pictures have, but the supervised one where labels are missing).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from data.batch import ImageBatch, TextBatch
from pretrain.objectives.protocol import JointObjective, Objective, Output, Tensors
from pretrain.objectives.teacher import Teacher

_BATCH = ("images", "sizes", "labels", "keys", "ids")


class Mixture(JointObjective):
    """Named objectives around one encoder."""

    def __init__(
        self,
        members: Mapping[str, Callable[[nn.Module], Objective]],
        weights: Mapping[str, float],
        encoder: nn.Module,
        export: str | None = None,
    ) -> None:
        """Around what `members` build around `encoder`; `export` names the one whose encoder is exported."""
        super().__init__()
        self.encoder, self.export = encoder, export
        self.members = nn.ModuleDict({name: build(encoder) for name, build in members.items()})
        self.weights = {name: weights.get(name, 1.0) for name in members}
        self.joint = any(member.joint for member in self.parts().values())
        for member in self.parts().values():
            # The encoder is a module of the mixture alone: a checkpoint holds it once.
            del member._modules["encoder"]
            object.__setattr__(member, "encoder", encoder)
            for teacher in member.children():
                if isinstance(teacher, Teacher):  # a later member may have initialised the encoder anew
                    teacher.follow(0.0, encoder=encoder)

    def parts(self) -> dict[str, Objective]:
        """The members by name."""
        return {name: member for name, member in self.members.items() if isinstance(member, Objective)}

    def forward(self, batch: ImageBatch | TextBatch, progress: float) -> Output:
        """The weighted sum; targets are samples. Metrics: each member's loss and metrics, behind its name."""
        return self._sum({name: member(batch, progress) for name, member in self.parts().items()}, len(batch))

    def view(self, batch: ImageBatch) -> Tensors:
        """Views and masks of the members that compare samples, and the batch itself for the others."""
        found = {f"batch/{name}": getattr(batch, name) for name in _BATCH}
        for name, member in self._comparing().items():
            found |= _prefixed(name, member.view(batch))
        return found

    def embed(self, views: Tensors, progress: float) -> Tensors:
        """Embeddings of the members that compare; of the others their `Output`, each sum as a row of its own."""
        batch = ImageBatch(**_of("batch", views))
        found: Tensors = {}
        for name, member in self.parts().items():
            if isinstance(member, JointObjective) and member.joint:
                found |= _prefixed(name, member.embed(_of(name, views), progress))
            else:
                found |= _prefixed(name, _rows(member(batch, progress)))
        return found

    def observe(self, views: Tensors, progress: float) -> Tensors:
        """What the members that compare observe, and the samples' keys."""
        found = {"batch/keys": views["batch/keys"]}
        for name, member in self._comparing().items():
            found |= _prefixed(name, member.observe(_of(name, views), progress))
        return found

    def compare(self, embeddings: Tensors, progress: float) -> Output:
        """The weighted sum over this process's whole share."""
        outputs = {}
        for name, member in self.parts().items():
            found = _of(name, embeddings)
            joint = isinstance(member, JointObjective) and member.joint
            outputs[name] = member.compare(found, progress) if joint else _output(found)  # type: ignore[operator]
        return self._sum(outputs, len(embeddings["batch/keys"]))

    def after_step(self, progress: float, statistics: Tensors) -> None:
        """Each member's, with its own statistics."""
        for name, member in self.parts().items():
            member.after_step(progress, _of(name, statistics))

    def exported(self) -> nn.Module:
        """The shared encoder, or the one that the chosen member exports."""
        return self.encoder if self.export is None else self.parts()[self.export].exported()

    def _comparing(self) -> dict[str, JointObjective]:
        return {n: m for n, m in self.parts().items() if isinstance(m, JointObjective) and m.joint}

    def _sum(self, outputs: dict[str, Output], samples: int) -> Output:
        """Members' sums, each brought from its targets to samples by their (constant) number in a sample."""
        loss = next(iter(outputs.values())).loss_sum.new_zeros(())
        metrics: Tensors = {}
        statistics: Tensors = {}
        for name, output in outputs.items():
            scale = samples / output.target_count.detach().clamp(min=1.0)
            loss = loss + self.weights[name] * scale * output.loss_sum
            sums = {"loss": output.loss_sum.detach()} | output.metrics
            metrics |= _prefixed(name, {key: value * scale for key, value in sums.items()})
            statistics |= _prefixed(name, output.statistics)
        return Output(loss, loss.new_tensor(float(samples)), metrics, statistics)


def _prefixed(name: str, tensors: Tensors) -> Tensors:
    return {f"{name}/{key}": value for key, value in tensors.items()}


def _of(name: str, tensors: Tensors) -> Tensors:
    """What `_prefixed` put behind `name`."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _rows(output: Output) -> Tensors:
    parts = {"loss": output.loss_sum, "count": output.target_count}
    parts |= _prefixed("metrics", output.metrics) | _prefixed("statistics", output.statistics)
    return {name: value[None] for name, value in parts.items()}


def _output(rows: Tensors) -> Output:
    sums = {name: value.sum(dim=0) for name, value in rows.items()}
    detached = {name: value.detach() for name, value in sums.items()}
    return Output(sums["loss"], detached["count"], _of("metrics", detached), _of("statistics", detached))
