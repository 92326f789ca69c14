"""`headwater export` of a task model, or of an encoder, into another tool's format: written, loaded back, compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.errors import UserError
from data.files import sha256, write_atomically
from finetune import export_graphs, export_layouts
from finetune.encoder import load_encoder
from finetune.export_card import export_card
from finetune.export_source import FORMATS, Exported, Format
from finetune.image_encoder import ImageEncoder
from finetune.model import TaskModel, claim, load_model, publish
from finetune.transformers_images import TransformersImages

FORMAT = 1
ABOUT = "headwater/model_export.json"
GOLDEN = "headwater/golden.safetensors"
TOLERANCE = 1e-4
"""Largest difference from the golden outputs that a reload may show, relative to their largest value."""
_SAMPLES = 5
_TOKENS = 12


def export_model(source: str | Path | TaskModel, out: str | Path, format: str | None = None) -> dict[str, Any]:
    """Write a task model's folder, or an encoder's, to `out` in a format of `FORMATS`; load it back and compare.

    Args:
        source: a folder that `finetune` made, or an export (its encoder alone is written), or a model in memory.
        out: the folder to make; an earlier export of this kind is replaced.
        format: without it timm for pictures and transformers for text.

    Returns:
        What `headwater/model_export.json` holds.

    Raises:
        UserError: a format that cannot hold the model, or a reload that gives other outputs.
    """
    exported, out = open_source(source), Path(out).expanduser()
    chosen = format_from(format) if format else _default(exported)
    hidden = claim(out, overwrite=(out / ABOUT).is_file())
    try:
        inputs = golden_inputs(exported)
        _write(exported, chosen, inputs, hidden)
        (hidden / "headwater").mkdir(exist_ok=True)
        golden = {f"input_{number}": each.contiguous() for number, each in enumerate(inputs)}
        save_file(golden | {"outputs": exported.outputs(*_ours(exported, inputs)).contiguous()}, hidden / GOLDEN)
        facts = export_graphs.description(exported) | {"format": FORMAT, "layout": chosen, "model": exported.about}
        write_atomically(hidden / "README.md", export_card(exported, chosen))
        files = sorted(path for path in hidden.rglob("*") if path.is_file() and path.name != "README.md")
        facts["files"] = {str(path.relative_to(hidden)): sha256(path) for path in files}
        write_atomically(hidden / ABOUT, json.dumps(facts, indent=1, ensure_ascii=False))
        facts["worst_difference"] = check_export(hidden)
        publish(hidden, out)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return facts


def check_export(folder: str | Path) -> float:
    """Load an export with the library it is for and compare with its golden outputs, at several batch sizes.

    Returns:
        The largest difference.

    Raises:
        UserError: no such export, a file that has changed, or outputs that differ by more than `TOLERANCE`.
    """
    folder = Path(folder).expanduser()
    try:
        about = json.loads((folder / ABOUT).read_text())
        golden = load_file(folder / GOLDEN)
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is no export of a model ({error}); export the model again") from None
    for name, digest in about["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise UserError(f"{folder / name} is missing or has changed since it was exported; export the model again")
    return compare(folder, about["layout"], golden)


def compare(folder: Path, layout: Format, golden: dict[str, Tensor]) -> float:
    """The largest difference of a folder's outputs from the golden ones; raises `UserError` above `TOLERANCE`."""
    outputs = golden["outputs"]
    inputs = [golden[f"input_{number}"] for number in range(len(golden) - 1)]
    worst = 0.0
    run = _runner(folder, layout)
    with torch.no_grad():
        for rows in (slice(None), slice(0, 1), slice(1, 4)):
            found = run(*(each[rows] for each in inputs)).float()
            difference = (found - outputs[rows]).abs().max().item()
            worst = max(worst, difference) if difference == difference else float("inf")
            same = torch.equal(found.argmax(dim=1), outputs[rows].argmax(dim=1))
            if not worst <= TOLERANCE * max(1.0, outputs.abs().max().item()) or not same:
                raise UserError(f"{folder} fails its self-test: outputs differ from the golden ones by {worst:.2g}")
    return worst


def open_source(source: str | Path | TaskModel) -> Exported:
    """A task model, or an encoder alone; raises `UserError` for any other folder."""
    if isinstance(source, TaskModel):
        return Exported.of_model(source)
    folder = Path(source).expanduser()
    if (folder / "ensemble.json").is_file():
        raise UserError(f"{folder} is an ensemble of several models; export each of its members/, or make a soup of it")
    if (folder / "task.json").is_file():
        return Exported.of_model(load_model(folder))
    encoder = load_encoder(folder).eval()
    about: dict[str, Any] = {name: encoder.info[name] for name in ("objective", "step") if name in encoder.info}
    return Exported(encoder, about=about)


def format_from(name: str) -> Format:
    """A known format; raises `UserError` for any other name."""
    for known in FORMATS:
        if name == known:
            return known
    raise UserError(f"there is no format {name!r}; choose one of {', '.join(FORMATS)}")


def golden_inputs(exported: Exported) -> tuple[Tensor, ...]:
    """Inputs to compare on: pictures of normal noise, or rows of random tokens of several lengths."""
    draw = torch.Generator().manual_seed(0)
    encoder: Any = exported.encoder
    if encoder.kind == "images":
        return (torch.randn(_SAMPLES, 3, encoder.image_size, encoder.image_size, generator=draw),)
    length = min(_TOKENS, encoder.context)
    words = [encoder.tokenizer.token_to_id(token) for token in sorted(encoder.tokenizer.get_vocab())][:5000]
    marks = {encoder.bos, encoder.eos, encoder.pad}
    known = torch.tensor([word for word in words if word not in marks])
    tokens = known[torch.randint(len(known), (_SAMPLES, length), generator=draw)]
    lengths = torch.tensor([length, *torch.randint(3, length + 1, (_SAMPLES - 1,), generator=draw).tolist()])
    real = (torch.arange(length) < lengths[:, None]).long()
    tokens[:, 0] = encoder.bos
    tokens[torch.arange(_SAMPLES), lengths - 1] = encoder.eos
    return tokens * real + encoder.pad * (1 - real), real


def _ours(exported: Exported, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What our encoder takes instead: document numbers, 1 on padding, in place of the mask."""
    return inputs if exported.encoder.kind == "images" else (inputs[0], 1 - inputs[1])


def _default(exported: Exported) -> Format:
    timms = isinstance(exported.encoder, ImageEncoder) and not isinstance(exported.encoder, TransformersImages)
    return "timm" if timms else "transformers"


def _write(exported: Exported, layout: Format, inputs: tuple[Tensor, ...], folder: Path) -> None:
    match layout:
        case "timm":
            export_layouts.write_timm(exported, folder)
        case "torchvision":
            export_layouts.write_torchvision(exported, folder)
        case "transformers":
            if exported.head is None and _default(exported) == "transformers":
                raise UserError("this encoder is a transformers folder already; copy it")
            export_layouts.write_transformers(exported, folder)
        case "onnx":
            export_graphs.write_onnx(exported, inputs, folder)
        case "torch":
            export_graphs.write_torch(exported, inputs, folder)


def _runner(folder: Path, layout: Format) -> export_graphs.Run:
    match layout:
        case "timm":
            return export_layouts.load_timm(folder)
        case "torchvision":
            return export_layouts.load_torchvision(folder)
        case "onnx":
            return export_graphs.load_onnx(folder)
        case "torch":
            return export_graphs.load_torch(folder)
    if "architecture" in json.loads((folder / "config.json").read_text()):
        from transformers import AutoModel, AutoModelForImageClassification
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        classified = json.loads((folder / "config.json").read_text())["num_classes"]
        theirs = (AutoModelForImageClassification if classified else AutoModel).from_pretrained(folder).eval()
        return lambda pixels: theirs(pixels).logits if classified else theirs(pixels).pooler_output
    model: Any = export_layouts.load_transformers(folder)
    if model.main_input_name == "pixel_values":
        return lambda pixels: model(pixels).logits
    return lambda tokens, mask: model(tokens, attention_mask=mask).logits
