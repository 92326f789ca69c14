"""Low-rank adapters by PEFT: put into a frozen encoder, tried, folded into its weights, kept in PEFT's own files."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.errors import UserError
from finetune.encoder import Encoder
from finetune.samples import Samples

_PREFIX = "base_model.model."
"""What PEFT's files put before the names of the model's own modules."""


@dataclass(frozen=True)
class Adapter:
    """Trained adapters apart from the weights they belong to."""

    config: dict[str, Any]
    """PEFT's `adapter_config.json`."""
    tensors: dict[str, Tensor]
    """PEFT's `adapter_model.safetensors`."""

    def save(self, folder: Path) -> None:
        """Write what `peft.PeftModel.from_pretrained(model, folder)` reads, where `model` is the export's."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """What `save` wrote."""
        config = json.loads((folder / "adapter_config.json").read_text())
        return cls(config, load_file(folder / "adapter_model.safetensors"))


def adapt(encoder: Encoder, rank: int, alpha: float, dropout: float, target: str | None, dora: bool) -> Encoder:
    """Freeze the encoder and put adapters into it, in place; as they begin, its outputs stay the same.

    `W` becomes `W + alpha / rank * B A` with `rank` rows in `A` (Hu et al. 2022); with `dora` the sum's direction
    is learned apart from its length, one number an output (Liu et al. 2024).

    Args:
        target: regular expression that a module's whole name must match, see `targets`.

    Raises:
        UserError: no module matches, or PEFT cannot adapt one that does.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = targets(encoder, target)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_pattern(names, [name for name, _ in network(encoder).named_modules()]),
        use_dora=dora,
    )
    encoder.requires_grad_(False)
    try:
        inject_adapter_in_model(config, network(encoder))
    except (ValueError, NotImplementedError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"PEFT cannot adapt what target_modules={target!r} matches: {reason}") from None
    return encoder


def network(encoder: Encoder) -> nn.Module:
    """The model inside, whose module names are those of the library it comes from."""
    return encoder.get_submodule("model")


def targets(encoder: Encoder, target: str | None) -> list[str]:
    """Names of the modules to adapt.

    Without a `target`, every linear layer above the stem (so not the patch embedding), which is those of
    attention and MLP; where there are none, every convolution above the stem that is not depthwise or grouped.
    """
    model, (depths, _) = network(encoder), encoder.layers()
    if target is not None:
        return _matching(target, [name for name, module in model.named_modules() if _adaptable(module)])
    for kind in (nn.Linear, nn.Conv2d):
        # Exact types: subclasses read their weights in ways of their own.
        found = [name for name, module in model.named_modules() if type(module) is kind and _whole(module)]
        found = [name for name in found if depths.get(f"model.{name}.weight", 0) > 0]
        if found:
            return found
    raise UserError(f"{encoder.folder} has neither linear layers nor convolutions above its stem: nothing to adapt")


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding | nn.MultiheadAttention)


def _whole(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) == 1


def _matching(target: str, names: list[str]) -> list[str]:
    try:
        found = [name for name in names if re.fullmatch(target, name)]
    except re.error as error:
        raise UserError(f"target_modules={target!r} is no regular expression: {error}") from None
    if not found:
        near = difflib.get_close_matches(target, names, n=1, cutoff=0) or names
        raise UserError(
            f"target_modules={target!r} matches no module's whole name; there is {near[0]!r}, for example "
            f"(target_modules='.*{near[0].rpartition('.')[2]}' matches it in every layer)"
        )
    return found


def _pattern(names: list[str], everything: list[str]) -> str:
    """A regular expression for exactly these module names: any layer number, unless that would match others too."""
    general = [re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name)) for name in names]
    short = "|".join(dict.fromkeys(general))
    if {name for name in everything if re.fullmatch(short, name)} == set(names):
        return short
    return "|".join(map(re.escape, names))


def adapted(encoder: Encoder) -> Iterator[tuple[str, Any]]:
    """Name and PEFT layer of every adapter."""
    from peft.tuners.lora import LoraLayer

    for name, module in network(encoder).named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@torch.no_grad()
def require_effect(encoder: Encoder, samples: Samples, device: torch.device) -> None:
    """Move each adapter in turn: in evaluation, the encoder's output must move with it.

    Some layers never call the modules inside them: `nn.MultiheadAttention` multiplies with
    `out_proj.weight` itself, and so does `nn.TransformerEncoderLayer` with all of its own on its fast path,
    which is taken in evaluation only. Adapters there would train and then do nothing.

    Raises:
        UserError: naming the first module whose adapter does nothing.
    """
    encoder.to(device).eval()
    positions, batch = next(samples.batches(2))
    del positions
    batch = batch.to(device)
    plain = encoder(batch)
    for name, layer in adapted(encoder):
        (weight,) = [p for part, p in layer.named_parameters() if re.match(r"lora_(embedding_)?B\.", part)]
        before = weight.clone()
        weight.normal_(generator=torch.Generator(device).manual_seed(0))
        moved = encoder(batch)
        weight.copy_(before)
        if torch.equal(moved, plain):
            raise UserError(
                f"an adapter on {name!r} does not change the encoder's output (nn.MultiheadAttention and fused "
                "layers read the weights without calling the module); leave it out with target_modules=REGEX"
            )


def merge(encoder: Encoder) -> Adapter:
    """Fold the adapters into the weights, in place, and return them; the encoder is a plain one again."""
    from peft import get_peft_model_state_dict

    model = network(encoder)
    (config,) = model.peft_config.values()  # type: ignore[operator]
    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    for name, layer in list(adapted(encoder)):
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    described = json.loads(json.dumps(config.to_dict(), default=sorted)) | {"inference_mode": True}
    described["target_modules"], tensors = encoder.foreign_adapter(described["target_modules"], tensors)
    encoder.requires_grad_(True)
    return Adapter(described, {_PREFIX + name: tensor for name, tensor in tensors.items()})
