"""Encoder and head as one graph: ONNX, and torch.export's `.pt2`, both for any batch (and any length of text)."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from data.errors import UserError
from finetune.export_layouts import classifier_tokenizer
from finetune.export_source import Exported
from finetune.text_encoder import DocumentEncoder
from pretrain.encoders.attention import Dense
from pretrain.encoders.text import View, rotary

Run = Callable[..., Tensor]


class PictureGraph(nn.Module):
    """`pixels` float32 (b, 3, s, s), normalised -> outputs float32 (b, outputs)."""

    names = ("pixels",)

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self.encoder, self.head, self.exported = exported.encoder, exported.head, exported

    def forward(self, pixels: Tensor) -> Tensor:
        return self.exported.finish(self.encoder.pool(pixels))


class TextGraph(nn.Module):
    """`input_ids` and `attention_mask`, int64 (b, n), padded on the right -> outputs float32 (b, outputs)."""

    names = ("input_ids", "attention_mask")

    def __init__(self, exported: Exported, encoder: DocumentEncoder) -> None:
        super().__init__()
        self.encoder, self.head, self.exported = encoder, exported.head, exported

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self._hidden(input_ids, attention_mask.bool())
        real = rearrange(attention_mask, "b n -> b n 1").to(hidden.dtype)
        if self.encoder.pooling == "last":
            place = torch.arange(hidden.shape[1])
            last = (place == attention_mask.sum(dim=1, keepdim=True) - 1).to(hidden.dtype)
            pooled = reduce(hidden * rearrange(last, "b n -> b n 1"), "b n d -> b d", "sum")
        else:
            pooled = reduce(hidden * real, "b n d -> b d", "sum") / reduce(real, "b n 1 -> b 1", "sum")
        return self.exported.finish(pooled)

    def _hidden(self, tokens: Tensor, real: Tensor) -> Tensor:
        """As `TextEncoder.forward` for one document a row, without a look at the data."""
        model, config = self.encoder.model, self.encoder.model.config
        index = torch.arange(tokens.shape[1])
        distance = index[:, None] - index[None, :]
        causal = self.encoder.loaded.causal
        views = []
        for local in (False, True):
            seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
            if local:
                seen = seen & (distance.abs() <= config.local_attention // 2 - int(causal))
            # Padding sees itself, so that no row of scores is empty.
            mask = (seen & rearrange(real, "b m -> b 1 1 m")) | (distance == 0)
            theta = (config.local_rope_theta if local else None) or config.rope_theta
            cos, sin = rotary(index[None], config.width // config.heads, theta)
            views.append(View(cos, sin, Dense(mask, False)))
        x = model.embeddings(tokens)
        for number, layer in enumerate(model.layers):
            x = layer(x, views[int(config.is_local(number))])
        return model.final_norm(x)


def graph_of(exported: Exported) -> PictureGraph | TextGraph:
    """The module to be traced; raises `UserError` for an encoder that no graph is known for."""
    if isinstance(exported.encoder, DocumentEncoder):
        return TextGraph(exported, exported.encoder).eval()
    if exported.encoder.kind == "images":
        return PictureGraph(exported).eval()
    raise UserError(f"no graph is known for a {type(exported.encoder).__name__}; choose another format")


def write_onnx(exported: Exported, inputs: tuple[Tensor, ...], folder: Path) -> None:
    """`model.onnx`, opset 18 or later, with the classes and the preprocessing in its metadata.

    Raises:
        UserError: the packages of the extra `onnx` are missing.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401 - needed for the check that follows
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install 'headwater[onnx]'") from None
    folder.mkdir(parents=True, exist_ok=True)
    graph = graph_of(exported)
    with _quiet():
        # Traced with two samples: a batch of one would be taken for a constant.
        program = torch.onnx.export(
            graph,
            tuple(each[:2] for each in inputs),
            dynamo=True,
            dynamic_shapes=_shapes(graph),
            input_names=list(graph.names),
            output_names=["outputs"],
            verbose=False,
        )
    assert program is not None
    program.save(str(folder / "model.onnx"))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for key, value in description(exported).items():
        model.metadata_props.add(key=f"headwater.{key}", value=json.dumps(value, ensure_ascii=False))
    onnx.save(model, folder / "model.onnx")
    _write_beside(exported, folder)


def load_onnx(folder: Path) -> Run:
    """The graph as onnxruntime runs it on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        fed = {name: each.numpy() for name, each in zip(names, inputs, strict=True)}
        return torch.from_numpy(session.run(None, fed)[0])

    return run


def write_torch(exported: Exported, inputs: tuple[Tensor, ...], folder: Path) -> None:
    """`model.pt2` for `torch.export.load`."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = graph_of(exported)
    with _quiet(), torch.no_grad():
        program = torch.export.export(graph, tuple(each[:2] for each in inputs), dynamic_shapes=_shapes(graph))
        torch.export.save(program, folder / "model.pt2")
    _write_beside(exported, folder)


def load_torch(folder: Path) -> Run:
    """The program as torch loads it, without any code of ours."""
    with _quiet():
        program = torch.export.load(folder / "model.pt2")
    run: Run = program.module()
    return run


def description(exported: Exported) -> dict[str, Any]:
    """What stands beside a graph: inputs and how to prepare them, outputs and what they mean."""
    encoder: Any = exported.encoder
    shared = {"task": exported.task, "classes": exported.classes, "features": encoder.features}
    if exported.encoder.kind == "text":
        return shared | {
            "inputs": {
                "input_ids": "int64 (batch, length)",
                "attention_mask": "int64 (batch, length), 1 on real tokens",
            },
            "preprocessing": {"tokenizer": "tokenizer.json", "padding": "right", "context": encoder.context},
        }
    size = encoder.image_size
    return shared | {
        "inputs": {"pixels": f"float32 (batch, 3, {size}, {size}), RGB"},
        "preprocessing": {
            "crop": "centre square",
            "resize": [size, size],
            "interpolation": encoder.interpolation,
            "antialias": True,
            "range": [0.0, 1.0],
            "mean": list(encoder.mean),
            "std": list(encoder.std),
        },
    }


def _write_beside(exported: Exported, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(description(exported), indent=1, ensure_ascii=False))
    if isinstance(exported.encoder, DocumentEncoder):
        for name, payload in classifier_tokenizer(exported.encoder).items():
            (folder / name).write_bytes(payload)


def _shapes(graph: PictureGraph | TextGraph) -> Any:
    batch = torch.export.Dim("batch", min=1)
    if isinstance(graph, PictureGraph):
        return ({0: batch},)
    length = torch.export.Dim("length", min=2, max=graph.encoder.context)
    return ({0: batch, 1: length}, {0: batch, 1: length})


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporters speak at length of what they leave out."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(before)
