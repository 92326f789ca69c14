"""A pre-trained encoder, as every strategy sees it: batches in, pooled features out."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from data.batch import ImageBatch, TextBatch
from data.errors import UserError
from data.files import sha256

Kind = Literal["images", "text"]
Pooling = Literal["mean", "last"]


@dataclass(frozen=True)
class Augmentation:
    """How training views of pictures differ; every draw comes from the samples' keys."""

    scale: tuple[float, float] = (0.6, 1.0)
    """Share of the picture's area that a crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of a crop, width over height."""
    flip: float = 0.0
    """Share of views mirrored left to right; 0.5 suits natural pictures, 0 digits and signs."""


class Encoder(nn.Module, ABC):
    """`forward(batch)` gives pooled features; the weights may be frozen or trained."""

    kind: Kind
    features: int
    """Width of the pooled features."""
    info: dict[str, Any]
    """The export's `headwater/export.json`, `{}` for a folder made by another tool."""
    folder: Path | None
    """Where the weights came from; None for controls that have none."""
    one_a_row: bool = False
    """Whether something on the network's modules tells samples apart by their row: then none may share one."""

    @abstractmethod
    def inputs(self, batch: Any, augment: Augmentation | None = None) -> tuple[Tensor, ...]:
        """What the network itself takes, from a batch on the network's device."""

    @abstractmethod
    def pool(self, *inputs: Tensor) -> Tensor:
        """Pooled features (b, features) of what `inputs` returned."""

    def tokens(self, *inputs: Tensor) -> Tensor:
        """Features of what `inputs` returned before they are pooled: text (b, n, token_features), pictures
        (b, h, w, token_features) on the grid of patches.

        Raises `UserError` where the encoder has none.
        """
        raise UserError(
            f"{type(self).__name__} gives one vector a sample; tasks on tokens or pixels need another encoder"
        )

    @property
    def token_features(self) -> int:
        """Width of what `tokens` gives."""
        return self.features

    @abstractmethod
    def layers(self) -> tuple[dict[str, int], int]:
        """Depth of each parameter, 0 at the input, and the depth at which a head on top stands."""

    @abstractmethod
    def untrained(self) -> Encoder:
        """The same architecture with weights drawn anew from the process-wide random state; see `fresh`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the encoder, with the weights as they are now, in the layout of the export it came from."""

    def forward(
        self, batch: ImageBatch | TextBatch, augment: Augmentation | None = None, dense: bool = False
    ) -> Tensor:
        """Pooled features (b, features), or `dense` ones as `tokens` gives.

        `augment` draws keyed views of pictures; text has none.
        """
        inputs = self.inputs(batch, augment)
        return self.tokens(*inputs) if dense else self.pool(*inputs)

    def foreign_adapter(self, pattern: str, tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
        """An adapter's target pattern and tensors under the module names of the library that reads the export."""
        return pattern, tensors

    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that decay would harm, such as position embeddings."""
        return set()


def load_encoder(source: str | Path, pooling: Pooling | None = None) -> Encoder:
    """Open an export of ours, a folder in timm's or transformers' layout, or a model of timm's by its name.

    Args:
        source: the folder; or a name of timm's, whose weights come from timm's hub (`untrained:NAME` for
            weights drawn with the seed 0).
        pooling: of a text encoder's tokens: `mean` over the real ones or the `last` one; without a choice
            `last` for decoders of transformers, `mean` for everything else.

    Raises:
        UserError: the folder is missing, is no encoder, or its weights do not fit its architecture; or the
            hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from finetune.timm_models import folder_of

        folder = folder_of(str(source))
    config, info = _json(folder / "config.json"), _json(folder / "headwater" / "export.json", {})
    names = ("model.safetensors", "model.safetensors.index.json")
    if not any((folder / name).is_file() for name in names):
        raise UserError(f"{folder} has no model.safetensors; only safetensors weights are read")
    for name, digest in info.get("files", {}).items():
        if name in ("config.json", "model.safetensors", "tokenizer.json") and sha256(folder / name) != digest:
            raise UserError(f"{folder / name} has changed since it was exported; export the run again")
    # Building a model draws weights, which the loaded ones then replace.
    with torch.random.fork_rng(devices=[]):
        if "architecture" in config:
            from finetune.image_encoder import ImageEncoder

            return ImageEncoder.load(folder, info)
        if "image_size" in config or "num_channels" in config:  # of transformers, for pictures
            from finetune.transformers_images import TransformersImages

            return TransformersImages.load(folder, info)
        if "model_type" in config:
            return _text(folder, config, info, pooling)
    raise UserError(f"{folder / 'config.json'} names neither a timm architecture nor a transformers model_type")


def _text(folder: Path, config: dict[str, Any], info: dict[str, Any], pooling: Pooling | None) -> Encoder:
    """An export of ours, or a model of transformers."""
    from finetune.text_encoder import DocumentEncoder
    from finetune.transformers_text import TransformersText

    if str(config["model_type"]).startswith("modernbert"):
        try:
            return DocumentEncoder.load(folder, info, pooling or "mean")
        except UserError:
            if info or not (folder / "tokenizer_config.json").is_file():  # ours, or nothing that transformers reads
                raise
    return TransformersText.load(folder, info, pooling)


def fresh(encoder: Encoder, seed: int) -> Encoder:
    """The same architecture with untrained weights: the control that shows what pre-training gave.

    Depends on `seed` alone and leaves the process-wide random state as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = encoder.untrained()
    dropped = ("files", "step", "samples")
    about = {name: value for name, value in encoder.info.items() if name not in dropped}
    untrained.info = about | {"objective": "untrained"}
    return untrained


def _json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file; `default` where there is no file."""
    if not path.is_file():
        if default is not None:
            return default
        raise UserError(f"{path} is missing; an encoder's folder holds config.json and model.safetensors")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no JSON ({error}); export the encoder again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; export the encoder again")
    return content
