"""Task models in the layouts of timm, torchvision and transformers, with one call each to load them there."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.errors import UserError
from data.tokenizer import special_ids, tokenizer_files
from finetune.export_classifier import classifier_head
from finetune.export_source import Exported
from finetune.image_encoder import ImageEncoder
from finetune.text_encoder import DocumentEncoder
from finetune.transformers_images import TransformersImages
from pretrain.encoders.modernbert import to_modernbert
from pretrain.encoders.torchvision_names import NAMES

_PROBLEMS = {
    "classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}


def write_timm(exported: Exported, folder: Path) -> None:
    """A folder for `timm.create_model("local-dir:…", pretrained=True)`: the model with its classifier.

    transformers reads it too (`AutoModelForImageClassification`).

    Raises:
        UserError: no pictures, or a model whose classifier is not one linear layer.
    """
    encoder = _pictures(exported, "timm")
    encoder.save(folder)
    if exported.head is None:
        return
    model = _with_classifier(encoder, exported)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["num_classes"] = len(exported.classes)
    config["label_names"] = exported.classes
    config.get("pretrained_cfg", {})["num_classes"] = len(exported.classes)
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))


def load_timm(folder: Path) -> nn.Module:
    """The model as timm loads it."""
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def write_torchvision(exported: Exported, folder: Path) -> None:
    """`model.safetensors` with torchvision's names, and `config.json` that says of which architecture.

    Raises:
        UserError: no pictures, or an architecture whose weights torchvision names or wires otherwise.
    """
    encoder = _pictures(exported, "torchvision")
    folder.mkdir(parents=True, exist_ok=True)
    architecture = json.loads((encoder.folder / "config.json").read_text())["architecture"]
    names = [theirs for theirs, timms in NAMES.items() if timms == architecture]
    model = encoder.model if exported.head is None else _with_classifier(encoder, exported)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    name = names[0] if names else architecture
    config = {"architecture": name, "classes": exported.classes}
    try:
        theirs = _torchvision(name, len(exported.classes))
        theirs.load_state_dict(weights)
    except (ValueError, RuntimeError, AttributeError):
        raise UserError(
            f"torchvision has no model that takes the weights of {architecture} (ResNets and DenseNets it does); "
            "export it as timm, onnx or torch"
        ) from None
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False))


def load_torchvision(folder: Path) -> nn.Module:
    """The model as torchvision builds it."""
    config = json.loads((folder / "config.json").read_text())
    model = _torchvision(config["architecture"], len(config["classes"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def write_transformers(exported: Exported, folder: Path) -> None:
    """A folder for `AutoModelForSequenceClassification`, or for pictures, `AutoModelForImageClassification`.

    Raises:
        UserError: an encoder or a pooling that their classifiers do not have.
    """
    encoder = exported.encoder
    if isinstance(encoder, TransformersImages):
        return _write_pictures(exported, encoder, folder)
    if isinstance(encoder, ImageEncoder):
        return write_timm(exported, folder)
    if not isinstance(encoder, DocumentEncoder):
        raise UserError(f"a {type(encoder).__name__} is not exported as transformers; choose onnx or torch")
    if exported.head is None:
        return encoder.save(folder)
    causal, config = encoder.loaded.causal, encoder.model.config
    if (encoder.pooling == "last") != causal:
        needed = "last" if causal else "mean"
        raise UserError(
            f"transformers' {'decoder' if causal else 'encoder'} classifiers pool by the {needed} token"
            f"{'' if causal else 's'}, this model by {encoder.pooling}; fine-tune with pooling={needed}, "
            "or export it as onnx or torch"
        )
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"encoder.{name}": tensor for name, tensor in encoder.model.state_dict().items()}
    described, tensors = to_modernbert(state, config, special_ids(encoder.tokenizer), causal)
    head = classifier_head(exported, encoder.model.final_norm.weight.detach(), config.norm_eps)
    tensors |= {
        "head.dense.weight": head.dense_weight,
        "head.dense.bias": head.dense_bias,
        "head.norm.weight": head.norm_weight,
        "classifier.weight": head.classifier_weight,
        "classifier.bias": head.classifier_bias,
    }
    described |= {
        "architectures": [f"ModernBert{'Decoder' if causal else ''}ForSequenceClassification"],
        "classifier_activation": "linear",
        "classifier_bias": True,
        "classifier_dropout": 0.0,
        "id2label": dict(enumerate(exported.classes)),
        "label2id": {name: number for number, name in enumerate(exported.classes)},
        "problem_type": _PROBLEMS[exported.task],
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described, indent=1, ensure_ascii=False))
    for name, payload in classifier_tokenizer(encoder).items():
        (folder / name).write_bytes(payload)


def _write_pictures(exported: Exported, encoder: TransformersImages, folder: Path) -> None:
    """A folder for `AutoModelForImageClassification`, or the bare encoder for `AutoModel`."""
    encoder.save(folder)
    if exported.head is not None:
        model: Any = encoder.classifier(*exported.linear(), exported.classes)
        model.config.problem_type = _PROBLEMS[exported.task]
        model.save_pretrained(folder)


def classifier_tokenizer(encoder: DocumentEncoder) -> dict[str, bytes]:
    """Their tokenizer's files that give the rows of `encoder.tokenize`: begin and end marks, padded on the right."""
    files = tokenizer_files(encoder.tokenizer, encoder.context, causal=True)
    both = json.loads(tokenizer_files(encoder.tokenizer, encoder.context, causal=False)["tokenizer.json"])
    described = json.loads(files["tokenizer.json"]) | {"post_processor": both["post_processor"]}
    config = json.loads(files["tokenizer_config.json"]) | {"padding_side": "right"}
    return {
        "tokenizer.json": json.dumps(described, indent=1, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False).encode(),
    }


def load_transformers(folder: Path) -> nn.Module:
    """The classifier as transformers loads it."""
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if "image_size" in (config := json.loads((folder / "config.json").read_text())) or "num_channels" in config:
        return transformers.AutoModelForImageClassification.from_pretrained(folder, use_safetensors=True).eval()
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True).eval()


def _pictures(exported: Exported, name: str) -> ImageEncoder:
    if not isinstance(exported.encoder, ImageEncoder) or isinstance(exported.encoder, TransformersImages):
        raise UserError(f"{name} holds timm's picture models, not a {type(exported.encoder).__name__}; choose another")
    return exported.encoder


@torch.no_grad()
def _with_classifier(encoder: ImageEncoder, exported: Exported) -> nn.Module:
    """The timm model with our head as its classifier."""
    weight, bias = exported.linear()
    model: Any = copy.deepcopy(encoder.model)
    model.reset_classifier(len(exported.classes))
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear) or classifier.weight.shape != weight.shape:
        raise UserError(
            f"the classifier of timm's {type(model).__name__} is no plain linear layer; choose onnx or torch"
        )
    _fill(classifier.weight, weight)
    _fill(classifier.bias, bias)
    return model.eval()


def _fill(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value.to(parameter.dtype))


def _torchvision(name: str, classes: int) -> nn.Module:
    import torchvision

    model: Any = torchvision.models.get_model(name, weights=None, **({"num_classes": classes} if classes else {}))
    if not classes:
        last = "fc" if isinstance(getattr(model, "fc", None), nn.Linear) else "classifier"
        setattr(model, last, nn.Identity())
    built: nn.Module = model
    return built
