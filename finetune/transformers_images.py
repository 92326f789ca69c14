"""Encoders of pictures from folders of transformers models, with their image processor's normalisation."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from data.errors import UserError
from finetune.image_encoder import ImageEncoder

PROCESSOR = "preprocessor_config.json"
_BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks?|stages?|stage)\.(\d+)(?=\.)")
_BICUBIC = 3
"""Pillow's number of it."""


class TransformersImages(ImageEncoder):
    """A picture model of transformers; its pooled features are what its own image classifier stands on.

    Read from safetensors alone, and without code from the folder.
    """

    model: Any

    def __init__(self, model: nn.Module, folder: Path, info: dict[str, Any]) -> None:
        """`model` is a `…ForImageClassification` whose classifier passes features on."""
        nn.Module.__init__(self)
        self.model, self.folder, self.info = model, folder, info
        self.mean, self.std, self.image_size = _processor(folder)
        self.interpolation = "bicubic" if _resample(folder) == _BICUBIC else "bilinear"
        self.canvas = 2 * self.image_size
        with torch.no_grad():
            blank = torch.zeros(1, 3, self.image_size, self.image_size)
            self.features = int(self.pool(blank).shape[1])
            self._width = int(self.tokens(blank).shape[3])

    @classmethod
    def load(cls, folder: Path, info: dict[str, Any]) -> Self:
        """A folder of transformers, with or without a classifier, which is left out.

        Raises:
            UserError: a kind of model that has no image classifier there, weights that do not fit, code that would
                have to run, or no image processor.
        """
        from transformers import AutoModelForImageClassification
        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        disable_progress_bar()
        set_verbosity_error()  # what is missing is said below
        try:
            model, loading = AutoModelForImageClassification.from_pretrained(
                folder,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            head = _headless(model)
            made = cls(model.eval(), folder, info)
        except UserError:
            raise
        except Exception as error:  # configurations are checked by several libraries, each with its own errors
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(f"{folder} does not load as a picture model of transformers: {reason[:300]}") from None
        mismatched = [name if isinstance(name, str) else name[0] for name in loading["mismatched_keys"]]
        missing = sorted(n for n in {*loading["missing_keys"], *mismatched} if not n.startswith(f"{head}."))
        if missing:
            raise UserError(
                f"the weights in {folder} lack {len(missing)} of the model's (such as {missing[0]}); "
                "config.json describes another"
            )
        return made

    def pool(self, *inputs: Tensor) -> Tensor:
        pooled: Tensor = self.model(pixel_values=inputs[0]).logits
        return pooled

    def tokens(self, *inputs: Tensor) -> Tensor:
        hidden = _hidden(self.model, inputs[0])
        if hidden.ndim == 4:
            return rearrange(hidden, "b d h w -> b h w d")
        side = math.isqrt(hidden.shape[1])  # class and register tokens stand before the square of patches
        return rearrange(hidden[:, hidden.shape[1] - side * side :], "b (h w) d -> b h w d", h=side)

    @property
    def token_features(self) -> int:
        return self._width

    def layers(self) -> tuple[dict[str, int], int]:
        """What stands before the first block at 0, then blocks (and what lies between them) in the model's order."""
        blocks: dict[tuple[str, ...], int] = {}
        depths, last = {}, 0
        for name, _ in self.named_parameters():
            place = tuple(_BLOCK.findall(name)[:2])  # a stage, and a block of it
            if place:
                last = blocks.setdefault(place, len(blocks) + 1)
            depths[name] = last
        return depths, len(blocks) + 1

    def no_weight_decay(self) -> set[str]:
        """Class and register tokens, position embeddings and tables of relative positions."""
        return {name for name, _ in self.named_parameters() if re.search(r"_tokens?$|position|relative", name)}

    def untrained(self) -> TransformersImages:
        from transformers import AutoModelForImageClassification

        model = AutoModelForImageClassification.from_config(self.model.config, dtype=torch.float32)
        _headless(model)
        return TransformersImages(model.eval(), self.folder, self.info)

    def save(self, folder: Path) -> None:
        """A folder for `AutoModel` and `AutoImageProcessor`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.base_model.save_pretrained(folder)
        shutil.copyfile(self.folder / PROCESSOR, folder / PROCESSOR)

    def classifier(self, weight: Tensor, bias: Tensor, classes: list[str]) -> nn.Module:
        """transformers' own classifier with this encoder's weights and a linear layer (classes, features).

        Raises `UserError` where theirs is no plain linear layer.
        """
        from transformers import AutoModelForImageClassification

        config = copy.deepcopy(self.model.config)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
        made: Any = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
        linear = [m for m in made.get_submodule(_head_name(made)).modules() if isinstance(m, nn.Linear)]
        if len(linear) != 1 or linear[0].weight.shape != weight.shape:
            raise UserError(f"the classifier of {type(made).__name__} is no plain linear layer; choose onnx or torch")
        made.base_model.load_state_dict(self.model.base_model.state_dict())
        with torch.no_grad():
            linear[0].weight.copy_(weight)
            linear[0].bias.copy_(bias)
        trained: nn.Module = made.eval()
        return trained


def _hidden(model: Any, pixels: Tensor) -> Tensor:
    hidden: Tensor = model.base_model(pixel_values=pixels).last_hidden_state
    return hidden


def _head_name(model: Any) -> str:
    """The name of the last module that is not the model proper."""
    names = [name for name, _ in model.named_children() if name in ("classifier", "head")]
    if not names:
        raise UserError(f"{type(model).__name__} has no classifier that could be left out; give it in timm's layout")
    return names[-1]


def _headless(model: Any) -> str:
    """Let the classifier pass features on; its name."""
    name = _head_name(model)
    head = getattr(model, name)
    # ResNet's flattens first.
    kept = [module for module in head if not isinstance(module, nn.Linear)] if isinstance(head, nn.Sequential) else []
    setattr(model, name, nn.Sequential(*kept) if kept else nn.Identity())
    model.config.problem_type = None
    return name


def _described(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / PROCESSOR).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{folder} has no {PROCESSOR} that says how pictures are normalised; save its image processor")
    return found


def _processor(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Mean, deviation and side in pixels of the pictures that the network sees."""
    found = _described(folder)
    size = found.get("crop_size") if found.get("do_center_crop") else None
    size = size or found.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{folder / PROCESSOR} does not say the size of pictures (size, crop_size)")
    if not found.get("do_normalize", True):
        return (0.0,) * 3, (1.0,) * 3, size
    return tuple(found.get("image_mean") or (0.5,) * 3), tuple(found.get("image_std") or (0.5,) * 3), size


def _resample(folder: Path) -> object:
    return _described(folder).get("resample")
