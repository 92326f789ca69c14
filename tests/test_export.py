"""Laws of exports: foreign libraries give the same outputs, and any change to the folder is noticed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from pretrain_kit import recipe
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from data.dataset import ShardedDataset
from data.errors import UserError
from data.files import sha256
from data.loader import sequential
from pretrain.encoders.vision import VisionConfig, eval_view
from pretrain.export import check, export_run, exported_step
from pretrain.loop import train
from pretrain.objectives.next_token import NextToken
from pretrain.reload import load_objective

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def trained(objective: str, data: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """The folder of a short run."""
    train(recipe(objective, data, {"train.steps": 3, "train.batch_size": 8} | settings), folder)
    return folder


@pytest.fixture(scope="module")
def runs(digits: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Short runs of each objective, with and without an average of the weights."""
    folder = tmp_path_factory.mktemp("runs")
    token = {"encoder.model_args.class_token": True, "encoder.pool": "token"}
    return {
        "images": trained("mae", digits / "train", folder / "images", {}),
        "images, token": trained("mae", digits / "train", folder / "token", token),
        "images, average": trained("mae", digits / "train", folder / "average", {"train.ema": 0.5}),
        "text": trained("next_token", sentences, folder / "text", {}),
        "text, average": trained("next_token", sentences, folder / "text_average", {"train.ema": 0.5}),
    }


@pytest.mark.parametrize("name", ["images", "images, token", "images, average"])
def test_pictures_through_timm_and_transformers(runs: dict[str, Path], name: str, digits: Path) -> None:
    export = runs[name] / "export"
    objective, chosen = load_objective(export)
    assert isinstance(chosen.encoder, VisionConfig)
    encoder = objective.exported().eval()
    if chosen.train.ema is not None:
        last = runs[name] / "checkpoints" / (runs[name] / "checkpoints" / "LATEST").read_text().strip()
        average = load_file(last / "ema.safetensors")
        assert not torch.equal(average["blocks.0.mlp.fc1.weight"], encoder.state_dict()["blocks.0.mlp.fc1.weight"])
        encoder.load_state_dict(average)
    batch = next(sequential(ShardedDataset(digits / "test"), 6, canvas=8))
    images = eval_view(batch, chosen.encoder)
    with torch.no_grad():
        ours = encoder(images)
        theirs = timm.create_model(f"local-dir:{export}", pretrained=True).eval()(images)
        assert_close(theirs, ours, **CLOSE)
        again = AutoModel.from_pretrained(export).eval()(images)
        assert_close(again.pooler_output, ours, **CLOSE)
    assert ours.std(0).max() > 1e-4


def test_the_preprocessing_travels_along(runs: dict[str, Path]) -> None:
    export = runs["images"] / "export"
    _, chosen = load_objective(export)
    assert isinstance(chosen.encoder, VisionConfig)
    picture = Image.effect_noise((16, 16), 64).convert("RGB")
    prepared = AutoImageProcessor.from_pretrained(export)(picture, return_tensors="pt")["pixel_values"]
    encoder = timm.create_model(f"local-dir:{export}", pretrained=True)
    described = timm.data.resolve_model_data_config(encoder)
    assert (tuple(described["mean"]), tuple(described["std"])) == (chosen.encoder.mean, chosen.encoder.std)
    assert (tuple(described["input_size"]), described["crop_pct"]) == ((3, 16, 16), 1.0)
    assert_close(timm.data.create_transform(**described)(picture)[None], prepared, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["text", "text, average"])
def test_text_through_transformers(runs: dict[str, Path], name: str) -> None:
    export = runs[name] / "export"
    objective, chosen = load_objective(export)
    assert isinstance(objective, NextToken)
    if chosen.train.ema is not None:
        last = runs[name] / "checkpoints" / (runs[name] / "checkpoints" / "LATEST").read_text().strip()
        average = load_file(last / "ema.safetensors")
        weight = objective.encoder.state_dict()["layers.0.attn.Wqkv.weight"]
        assert not torch.equal(average["layers.0.attn.Wqkv.weight"], weight)
        objective.encoder.load_state_dict(average)
    tokenizer = AutoTokenizer.from_pretrained(export)
    tokens = tokenizer("42 bottles of beer on the wall", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours = objective.logits(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(export).eval()(tokens).logits
    assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
    assert "beer" in tokenizer.decode(tokens[0])


@pytest.mark.parametrize("name", ["images", "images, average", "text"])
def test_an_export_made_from_the_checkpoint_is_the_run_s_own(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    export_run(runs[name], tmp_path / "again")
    files = sorted(p.relative_to(runs[name] / "export") for p in (runs[name] / "export").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (runs[name] / "export" / file).read_bytes(), file
    assert exported_step(tmp_path / "again") == 3


@pytest.mark.parametrize("name", ["images", "text"])
def test_changed_weights_fail_the_self_test(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(runs[name] / "export", folder)
    check(folder)
    weights = load_file(folder / "model.safetensors")
    victim = next(key for key in weights if key.endswith(("fc1.weight", "Wi.weight")))
    weights[victim] = weights[victim] * 1.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert exported_step(folder) is None
    with pytest.raises(UserError, match=r"model\.safetensors is missing or has changed"):
        check(folder)
    # Even when the checksum was brought up to date.
    about = json.loads((folder / "headwater" / "export.json").read_text())
    about["files"]["model.safetensors"] = sha256(folder / "model.safetensors")
    (folder / "headwater" / "export.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="outputs differ"):
        check(folder)


@pytest.mark.parametrize("name", ["config.json", "headwater/golden.safetensors", "headwater/objective.safetensors"])
def test_a_changed_or_missing_file_is_named(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(runs["images"] / "export", folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1] + b" ")
    with pytest.raises(UserError, match=name):
        check(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=name):
        check(folder)


def test_only_an_export_is_ever_replaced(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="is no export of ours"):
        export_run(runs["images"], tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    with pytest.raises(UserError, match="is no export of ours"):
        export_run(runs["images"], tmp_path / "mine" / "thesis.txt")
    export_run(runs["images"], tmp_path / "new")
    export_run(runs["images, average"], tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "new"]


@pytest.mark.parametrize("name", ["images", "text"])
def test_the_model_card_s_code_runs(
    runs: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs[name] / "export")
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    exec(blocks[0], {})
    said = capsys.readouterr().out
    assert "(1, 32)" in said if name == "images" else "The" in said


def test_mixed_precision_changes_no_layout(digits: Path, sentences: Path, tmp_path: Path) -> None:
    for objective, data in (("mae", digits / "train"), ("next_token", sentences)):
        run = trained(objective, data, tmp_path / objective, {"train.precision": "bf16"})
        weights = load_file(run / "export" / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("missing", ["recipe.yaml", "checkpoints"])
def test_what_is_no_run_is_said(runs: dict[str, Path], missing: str, tmp_path: Path) -> None:
    shutil.copytree(runs["images"], tmp_path / "run")
    path = tmp_path / "run" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match="no run folder" if missing == "recipe.yaml" else "no checkpoint yet"):
        export_run(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
