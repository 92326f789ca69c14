"""The card of an exported task model: what it is, and code that runs in its folder."""

from __future__ import annotations

from typing import Any

from finetune.export_source import Exported, Format
from pretrain.encoders import resnet_cifar

_SHOW = """
for probability, name in zip(outputs[0].softmax(0), names):
    print(f"{name}: {probability:.3f}")"""
_SHOW_FEATURES = """
print(tuple(outputs.shape))"""
_PIXELS = "pixels = torch.zeros(1, 3, {size}, {size})   # normalised RGB, see below"
_CODE: dict[str, str] = {
    "timm": """import timm, torch
{imports}
model = timm.create_model("local-dir:.", pretrained=True).eval()   # "." is this folder
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))   # for PIL images
names = model.pretrained_cfg.get("label_names")
{pixels}
outputs = model(pixels).detach(){show}""",
    "torchvision": """import json
import torch, torchvision
from safetensors.torch import load_file

config = json.load(open("config.json"))
names = config["classes"]
model = torchvision.models.get_model(config["architecture"], **({{"num_classes": len(names)}} if names else {{}}))
if not names:
    model.fc = torch.nn.Identity()
model.load_state_dict(load_file("model.safetensors"))
{pixels}
outputs = model.eval()(pixels).detach(){show}""",
    "onnx": """import json
import numpy as np, onnxruntime, torch

names = json.load(open("config.json"))["classes"]
session = onnxruntime.InferenceSession("model.onnx")
{inputs}
outputs = torch.from_numpy(session.run(None, {{name: each.numpy() for name, each in inputs.items()}})[0]){show}""",
    "torch": """import json
import torch

names = json.load(open("config.json"))["classes"]
model = torch.export.load("model.pt2").module()
{inputs}
outputs = model(*inputs.values()).detach(){show}""",
}
_TEXT_INPUTS = """from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
ids = torch.tensor([tokenizer.encode("a fine film").ids])
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}"""
_PIPELINE = """from transformers import pipeline

classify = pipeline("text-classification", model=".")   # "." is this folder
print(classify("a fine film", truncation=True, top_k=None))"""
_WRAPPER = """import torch
from transformers import {auto}

model = {auto}.from_pretrained(".").eval()   # "." is this folder
{pixels}
outputs = model(pixels).{field}.detach()
names = list(model.config.id2label.values()){show}"""


def export_card(exported: Exported, layout: Format) -> str:
    """Markdown with front matter; its code runs inside the folder."""
    front = ["---", f"library_name: {_LIBRARIES[layout]}"]
    kind = "image" if exported.encoder.kind == "images" else "text"
    tasks = {"classification": f"{kind}-classification", "features": f"{kind}-feature-extraction"}
    if exported.task in tasks and not (kind == "text" and exported.task == "features"):
        front.append(f"pipeline_tag: {tasks[exported.task]}")
    title = "Encoder" if exported.head is None else f"Model for {exported.task}"
    facts = [("task", exported.task), ("outputs", _names(exported) or f"{exported.encoder.features} features")]
    facts += [(name, str(exported.about[name])) for name in ("strategy", "labels", "seed") if name in exported.about]
    if exported.temperature != 1.0:
        facts.append(("temperature", f"{exported.temperature:.4g}, part of the weights"))
    table = "\n".join(["| | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in facts])
    return "\n".join([*front, "---"]) + (
        f"\n\n# {title}\n\nFine-tuned and exported with headwater.\n\n{table}\n\n## Use\n\n"
        f"```python\n{_code(exported, layout)}\n```\n\n## Input\n\n{_input(exported)}\n\n"
        "`headwater/golden.safetensors` holds a few inputs with the outputs they must give.\n"
    )


_LIBRARIES = {
    "timm": "timm",
    "transformers": "transformers",
    "torchvision": "torchvision",
    "onnx": "onnx",
    "torch": "pytorch",
}


def _code(exported: Exported, layout: Format) -> str:
    encoder: Any = exported.encoder
    images, named = encoder.kind == "images", exported.task == "classification"
    show = _SHOW if named else _SHOW_FEATURES
    if layout == "transformers" and not images:
        return _PIPELINE
    pixels = _PIXELS.format(size=encoder.image_size) if images else ""
    inputs = f'{pixels}\ninputs = {{"pixels": pixels}}' if images else _TEXT_INPUTS
    if layout == "transformers":
        field = "logits" if exported.head is not None else "pooler_output"
        auto = "AutoModelForImageClassification" if exported.head is not None else "AutoModel"
        return _WRAPPER.format(auto=auto, pixels=pixels, field=field, show=show)
    ours = layout == "timm" and encoder.info.get("recipe", {}).get("encoder", {}).get("model") in resnet_cifar.__all__
    imports = "import pretrain.encoders.resnet_cifar   # of headwater: tells timm of this model\n" if ours else ""
    return _CODE[layout].format(pixels=pixels, inputs=inputs, show=show, imports=imports)


def _input(exported: Exported) -> str:
    encoder: Any = exported.encoder
    if encoder.kind == "text":
        return (
            f"Token ids of `tokenizer.json`, its begin and end marks included, at most {encoder.context}, padded on "
            "the right. Longer texts were cut there in training."
        )
    return (
        f"The central square of an RGB picture, resized to {encoder.image_size} x {encoder.image_size} "
        f"({encoder.interpolation}, antialiased), scaled to [0, 1]; then mean {list(encoder.mean)} is subtracted and "
        f"the result divided by {list(encoder.std)}."
    )


def _names(exported: Exported) -> str:
    shown = ", ".join(" ".join(name.split()).replace("|", "/") for name in exported.classes[:20])
    return shown + (f" and {len(exported.classes) - 20} more" if len(exported.classes) > 20 else "")
