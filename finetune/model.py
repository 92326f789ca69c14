"""A fine-tuned model: an encoder, a head and the names of its classes; and its folder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import UserError
from data.files import sha256, sync
from finetune.adapters import Adapter
from finetune.encoder import Encoder, load_encoder
from finetune.features import accelerator_for, extract
from finetune.heads import LinearHead, MLPHead, NeighbourHead
from finetune.samples import Samples
from finetune.settings import Settings
from finetune.targets import Target, target_from
from finetune.targets_class import Classification

FORMAT = 1
Head = LinearHead | MLPHead | NeighbourHead


@dataclass
class TaskModel:
    """Says of a sample what its `target` asks, over `classes`."""

    encoder: Encoder
    head: Head
    classes: list[str]
    about: dict[str, Any] = field(default_factory=dict)
    """Free facts kept in task.json: strategy, seed, what was chosen, the export it came from."""
    temperature: float = 1.0
    """Logits are divided by it before the softmax; fitted on data of its own by `finetune.calibration`."""
    target: Target = None  # type: ignore[assignment]
    """What it says about a sample; a classification over `classes` where not given."""
    adapter: Adapter | None = None
    """The low-rank adapters that the encoder's weights have in them already, apart."""

    def __post_init__(self) -> None:
        if self.target is None:
            self.target = Classification(self.classes)

    def probabilities(self, samples: Samples, settings: Settings | None = None) -> Tensor:
        """float32 (n, classes) on the CPU, rows sum to 1."""
        settings = settings or Settings()
        return self.from_features(extract(self.encoder, samples, settings, accelerator_for(settings)))

    @torch.no_grad()
    def say(self, batch: Any, accelerator: Accelerator) -> Tensor:
        """`Target.distribution` of a batch of inputs: float32, on the accelerator's device; of a task on whole
        samples on the CPU."""
        self.encoder.to(accelerator.device).eval()
        with accelerator.autocast():
            features: Tensor = self.encoder(batch.to(accelerator.device), dense=self.target.dense)
        if not self.target.dense:
            return self.from_features(features.float().cpu())
        return self.target.distribution(self.head.to(accelerator.device).eval()(features.float()))

    @torch.no_grad()
    def from_features(self, features: Tensor) -> Tensor:
        """The same from pooled features (n, d) on the CPU, where every kind of task leaves it."""
        if not isinstance(self.target, Classification):
            return self.target.distribution(self.logits(features))
        if self.temperature == 1.0:
            return self.head.cpu().probabilities(features)
        return self.logits(features).softmax(dim=1)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        """float32 (n, classes) from pooled features (n, d) on the CPU, divided by the temperature."""
        return self.head.cpu()(features.float()) / self.temperature

    def save(self, folder: Path) -> None:
        """Write `task.json`, `head.safetensors`, `encoder/` (an export with these weights), and, where low-rank
        adapters were trained, `adapter/` (PEFT's own files, for the encoder as it was before)."""
        folder.mkdir(parents=True, exist_ok=True)
        save_encoder(self.encoder, folder / "encoder")
        if self.adapter is not None:
            self.adapter.save(folder / "adapter")
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.head.state_dict().items()}
        save_file(tensors, folder / "head.safetensors")
        pooling = {"pooling": self.encoder.pooling} if self.encoder.kind == "text" else {}
        task = {
            "format": FORMAT,
            "kind": self.encoder.kind,
            **self.target.describe(),
        }
        if self.temperature != 1.0:
            task["temperature"] = self.temperature
        text = json.dumps(task | pooling | {"head": _describe(self.head)} | self.about, indent=1, ensure_ascii=False)
        (folder / "task.json").write_text(text)


def load_model(folder: str | Path) -> TaskModel:
    """A model from the folder that `headwater finetune` wrote; raises `UserError` when it is not one."""
    path = Path(folder).expanduser()
    try:
        task = json.loads((path / "task.json").read_text())
        if task["format"] != FORMAT:
            raise UserError(f"{path} is a model of format {task['format']}; this version reads {FORMAT}")
        encoder = load_encoder(path / "encoder", task.get("pooling"))
        tensors = load_file(path / "head.safetensors")
        target = target_from(task)
        head = _head(task["head"], tensors, target.outputs)
        head.load_state_dict(tensors)
        adapter = Adapter.load(path / "adapter") if (path / "adapter").is_dir() else None
    except FileNotFoundError:
        raise UserError(f"{path} is no fine-tuned model: task.json or head.safetensors is missing") from None
    except (json.JSONDecodeError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"the model in {path} is damaged ({error}); fine-tune again") from None
    known = ("format", "kind", "head", "pooling", "temperature", *target.describe())
    about = {name: value for name, value in task.items() if name not in known}
    temperature = float(task.get("temperature", 1.0))
    return TaskModel(encoder.eval(), head.eval(), target.classes, about, temperature, target, adapter)


def save_encoder(encoder: Encoder, folder: Path) -> None:
    """An export with the encoder's present weights; what described the old ones (card, heads) is left out."""
    encoder.save(folder)
    if encoder.info:
        files = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}
        (folder / "headwater").mkdir(exist_ok=True)
        text = json.dumps(encoder.info | {"files": files}, indent=1)
        (folder / "headwater" / "export.json").write_text(text)


def claim(output: Path, overwrite: bool) -> Path:
    """A hidden folder beside `output` to write into; raises `UserError` when `output` is taken."""
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} already exists; remove it, choose another folder, or pass --overwrite")
    hidden = output.parent / f".{output.name}.{os.getpid()}.partial"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
    except OSError as error:
        raise UserError(f"cannot write beside {output}: {error.strerror}; choose a folder you own") from None
    return hidden


def publish(hidden: Path, output: Path) -> None:
    """Force the finished folder to disk and give it its name."""
    for path in sorted(hidden.rglob("*")):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        else:
            sync(path)
    if output.exists():
        shutil.rmtree(output) if output.is_dir() else output.unlink()
    os.replace(hidden, output)
    sync(output.parent)


def _describe(head: Head) -> dict[str, Any]:
    if isinstance(head, NeighbourHead):
        return {"name": "neighbours", "k": head.k, "temperature": head.temperature}
    if isinstance(head, MLPHead):
        return {"name": "mlp", "hidden": head.hidden.out_features}
    return {"name": "linear", "layer_norm": isinstance(head.norm, torch.nn.LayerNorm)}


def _head(about: dict[str, Any], tensors: dict[str, Tensor], classes: int) -> Head:
    if about["name"] == "neighbours":
        return NeighbourHead(tensors["bank"], tensors["labels"], classes, about["k"], about["temperature"])
    if about["name"] == "mlp":
        return MLPHead(tensors["mean"].shape[0], about["hidden"], classes)
    return LinearHead(tensors["mean"].shape[0], classes, about["layer_norm"])
