"""An exported task model gives our logits in every library; its card's code runs; changed weights are noticed."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_finetune_kit import sentences, write_encoder, write_text_encoder
from torch.testing import assert_close

from data.errors import UserError
from data.files import sha256
from data.tokenizer import special_ids
from data.tokenizer import train as train_tokenizer
from finetune.encoder import load_encoder
from finetune.export_graphs import load_onnx, load_torch
from finetune.export_layouts import load_timm, load_torchvision
from finetune.export_model import ABOUT, check_export, compare, export_model
from finetune.heads import LinearHead, NeighbourHead
from finetune.model import TaskModel, load_model
from finetune.run import finetune
from finetune.targets_vector import Regression
from finetune.text_encoder import DocumentEncoder
from launch.cli import main
from pretrain.encoders.modernbert import to_modernbert
from pretrain.encoders.text import TextConfig, TextEncoder

pytest_plugins = ["test_finetune_kit"]
TEXTS = [
    "a good film",
    "it was awful",
    "the great and the dull, a fine film that was of it",
    "bad",
    "odd ¿τ? <|eos|> x",
]


def _masked(folder: Path, width: int = 32) -> Path:
    """A text encoder that sees both ways, with windows and two rotary bases."""
    tokenizer = train_tokenizer(["the good and the bad, a fine dull film"] * 20, 300)
    config = TextConfig(
        vocab_size=tokenizer.get_vocab_size(), width=width, depth=3, heads=2, intermediate_size=48, context=32,
        global_every=2, local_attention=6, local_rope_theta=500.0,
    )  # fmt: skip
    torch.manual_seed(0)
    state = {f"encoder.{name}": tensor for name, tensor in TextEncoder(config).state_dict().items()}
    for tensor in state.values():
        tensor += 0.2 * torch.randn(tensor.shape)
    described, tensors = to_modernbert(state, config, special_ids(tokenizer), causal=False)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(described))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _head(features: int, classes: int, layer_norm: bool = False) -> LinearHead:
    """A head with every number away from its start."""
    head = LinearHead(features, classes, layer_norm=layer_norm)
    draw = torch.Generator().manual_seed(1)
    for tensor in head.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw))
    head.scale.abs_().add_(0.5)
    return head.eval()


def _model(encoder: Any, classes: int = 3, **about: Any) -> TaskModel:
    names = [f"class {number}" for number in range(classes)]
    return TaskModel(encoder.eval(), _head(encoder.features, classes), names, temperature=1.7, **about)


@torch.no_grad()
def _expected(model: TaskModel, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of ids, their mask, and our logits, one text at a time: no padding."""
    encoder = model.encoder
    assert isinstance(encoder, DocumentEncoder)
    rows = [torch.from_numpy(row) for row in encoder.tokenize(texts)]
    logits = [model.logits(encoder.pool(row[None], torch.zeros_like(row)[None])) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=encoder.pad)
    real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, real, torch.cat(logits)


def _equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert_close(found.detach(), expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("layout", ["timm", "transformers", "onnx", "torch"])
@torch.no_grad()
def test_pictures(layout: str, export: Path, tmp_path: Path) -> None:
    model = _model(load_encoder(export))
    export_model(model, tmp_path / "out", layout)
    for count in (1, 3, 7):
        pixels = torch.randn(count, 3, 16, 16)
        expected = model.logits(model.encoder.pool(pixels))
        if layout == "transformers":
            from transformers import AutoModelForImageClassification

            theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
            assert theirs.config.id2label == {0: "class 0", 1: "class 1", 2: "class 2"}
            found = theirs(pixels).logits
        else:
            found = {"timm": load_timm, "onnx": load_onnx, "torch": load_torch}[layout](tmp_path / "out")(pixels)
        _equal(found, expected)
    if layout == "timm":
        assert list(load_timm(tmp_path / "out").pretrained_cfg["label_names"]) == model.classes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "pooling"),
    [
        ("transformers", "mean"),
        ("transformers", "last"),
        ("onnx", "mean"),
        pytest.param("onnx", "last", marks=pytest.mark.slow),
        ("torch", "mean"),
        pytest.param("torch", "last", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_texts_of_any_length_and_padding(layout: str, pooling: str, tmp_path: Path) -> None:
    # A decoder's classifier pools by the last token, an encoder's by the mean.
    source = _masked(tmp_path / "e") if pooling == "mean" else write_text_encoder(tmp_path / "e")
    model = _model(load_encoder(source, pooling))
    export_model(model, tmp_path / "out", layout)
    ids, real, expected = _expected(model, TEXTS)
    if layout == "transformers":
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

        theirs, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(
            TEXTS, padding=True, truncation=True, return_tensors="pt"
        )
        assert torch.equal(tokens["input_ids"], ids)
        assert torch.equal(tokens["attention_mask"], real)
        _equal(theirs.eval()(**tokens).logits, expected)
        said = pipeline("text-classification", model=str(tmp_path / "out"))(TEXTS, truncation=True)
        assert [each["label"] for each in said] == [model.classes[i] for i in expected.argmax(1)]
        scores = np.array([each["score"] for each in said])
        np.testing.assert_allclose(scores, expected.softmax(1).max(1).values.numpy(), atol=1e-4)
        return
    _equal({"onnx": load_onnx, "torch": load_torch}[layout](tmp_path / "out")(ids, real), expected)


@torch.no_grad()
def test_heads_with_a_norm_many_classes_or_units_are_exact_too(tmp_path: Path) -> None:
    from finetune.export_layouts import load_transformers

    encoder = load_encoder(_masked(tmp_path / "e"))
    normed = _model(encoder)
    normed.head = _head(encoder.features, 3, layer_norm=True)
    regression = _model(encoder)
    regression.temperature, regression.target = 1.0, Regression(regression.classes, [1.0, -2.0, 3.0], [0.5, 2.0, 9.0])
    for number, model in enumerate([normed, _model(encoder, 15), regression]):
        about = export_model(model, tmp_path / str(number), "transformers")
        ids, real, expected = _expected(model, TEXTS)
        if model is regression:
            expected = model.target.decide(expected)
        found = load_transformers(tmp_path / str(number))(ids, attention_mask=real).logits
        _equal(found, expected)
        assert about["worst_difference"] < 1e-4
    with pytest.raises(UserError, match="16 outputs do not fit"):
        export_model(_model(encoder, 16), tmp_path / "many", "transformers")
    assert not (tmp_path / "many").exists()


@pytest.mark.slow
@torch.no_grad()
def test_neighbours_fit_into_graphs_only(export: Path, tmp_path: Path) -> None:
    encoder = load_encoder(export)
    draw = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(40, encoder.features, generator=draw), torch.arange(40) % 3
    model = TaskModel(encoder.eval(), NeighbourHead(bank, labels, 3, k=7), ["a", "b", "c"])
    with pytest.raises(UserError, match="bank of neighbours"):
        export_model(model, tmp_path / "timm", "timm")
    pixels = torch.randn(6, 3, 16, 16)
    expected = model.from_features(encoder.pool(pixels))
    for layout, load in (("onnx", load_onnx), ("torch", load_torch)):
        export_model(model, tmp_path / layout, layout)
        assert_close(load(tmp_path / layout)(pixels).detach().softmax(1), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_torchvision_takes_a_resnet(tmp_path: Path) -> None:
    folder = tmp_path / "resnet"
    folder.mkdir()
    resnet = timm.create_model("resnet18", num_classes=0)
    for buffer in resnet.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    save_file(resnet.state_dict(), folder / "model.safetensors")
    preset = {"input_size": [3, 64, 64], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "resnet18", "num_classes": 0, "num_features": 512, "pretrained_cfg": preset}
    (folder / "config.json").write_text(json.dumps(config))
    model = _model(load_encoder(folder))
    pixels = torch.randn(2, 3, 64, 64)
    export_model(model, tmp_path / "classifier", "torchvision")
    _equal(load_torchvision(tmp_path / "classifier")(pixels), model.logits(model.encoder.pool(pixels)))
    export_model(folder, tmp_path / "encoder", "torchvision")
    assert_close(load_torchvision(tmp_path / "encoder")(pixels), model.encoder.pool(pixels), rtol=0, atol=1e-4)
    _run_card(tmp_path / "classifier")
    _run_card(tmp_path / "encoder")


def test_changed_weights_are_noticed(export: Path, tmp_path: Path) -> None:
    model = _model(load_encoder(export))
    export_model(model, tmp_path / "out")
    assert check_export(tmp_path / "out") < 1e-4
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    weights["head.weight"][0, 0] += 0.1
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="has changed"):
        check_export(tmp_path / "out")
    # Even where the checksum is brought into line.
    about = json.loads((tmp_path / "out" / ABOUT).read_text())
    about["files"]["model.safetensors"] = sha256(path)
    (tmp_path / "out" / ABOUT).write_text(json.dumps(about))
    with pytest.raises(UserError, match="fails its self-test"):
        check_export(tmp_path / "out")
    with pytest.raises(UserError, match="fails its self-test"):
        compare(tmp_path / "out", "timm", load_file(tmp_path / "out" / "headwater" / "golden.safetensors"))


def _run_card(folder: Path) -> None:
    """Run the card's code inside its folder."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    assert code
    script = folder.parent / f"{folder.name}.py"
    script.write_text(code[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path(str(script))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "text"])
def test_from_the_shell_every_card_runs_and_outputs_are_whole_or_absent(
    kind: str,
    export: Path,
    sentiment: tuple[Path, Path],
    digit_shards: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, data = (export, digit_shards) if kind == "images" else (_masked(tmp_path / "e"), sentiment)
    finetune(source, *data, labels_per_class=5, output=tmp_path / "m", report=lambda _: None, cpu=True)
    layouts = ["timm", "onnx", "torch"] if kind == "images" else ["transformers", "onnx", "torch"]
    for layout in layouts:
        assert main(["export", str(tmp_path / "m"), str(tmp_path / layout), "--format", layout]) == 0
        assert "self-test passed" in capsys.readouterr().out
        _run_card(tmp_path / layout)
        printed = capsys.readouterr().out
        assert all(name in printed for name in load_model(tmp_path / "m").classes)
    # An earlier export is replaced, anything else is not.
    assert main(["export", str(tmp_path / "m"), str(tmp_path / layouts[0])]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep.txt").write_text("mine")
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine" / "keep.txt").read_text() == "mine"
    wrong = "transformers" if kind == "images" else "timm"
    assert main(["export", str(tmp_path / "m"), str(tmp_path / "w"), "--format", wrong]) == (
        0 if kind == "images" else 2
    )
    # The encoder alone, from an export.
    assert main(["export", str(source), str(tmp_path / "enc"), "--format", "onnx"]) == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_an_encoder_alone_as_a_graph(export: Path, tmp_path: Path) -> None:
    write_encoder(tmp_path / "e")
    for source in (tmp_path / "e", _masked(tmp_path / "t")):
        encoder = load_encoder(source)
        export_model(source, tmp_path / "out", "onnx")
        _run_card(tmp_path / "out")
        texts = sentences(4, 1)[0]
        if isinstance(encoder, DocumentEncoder):
            batch = encoder.batch(encoder.tokenize(texts), torch.zeros(4), torch.zeros(4))
            inputs = batch.tokens, 1 - batch.documents
            expected = encoder(batch)
        else:
            inputs = (torch.randn(3, 3, 16, 16),)
            expected = encoder.pool(*inputs)
        assert_close(load_onnx(tmp_path / "out")(*inputs), expected.detach(), rtol=0, atol=1e-4)
