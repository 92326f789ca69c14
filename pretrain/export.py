"""From a trained objective to a folder that other tools load.

The folder's top is in the ecosystem's own layout (timm for pictures, transformers for text); what only
headwater needs lies in `headwater/`: the whole objective for continued pre-training, the recipe, and a few
golden inputs and outputs that are compared whenever an export is checked.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.errors import UserError
from data.files import sha256, sync, write_atomically
from data.loader import sequential
from pretrain.build import Datasets, build_objective, open_data
from pretrain.card import model_card
from pretrain.checkpoint import choose
from pretrain.ema import start_average
from pretrain.encoders.modernbert import export_files
from pretrain.encoders.text import TextConfig
from pretrain.encoders.vision import VisionConfig, eval_view, timm_arguments
from pretrain.objectives.replaced_token import ReplacedToken
from pretrain.objectives.text import TextObjective
from pretrain.optim import build_optimizer
from pretrain.recipe import Recipe
from pretrain.recipe_file import load_recipe
from pretrain.state import TrainingState

FORMAT = 1
TOLERANCE = 1e-4
"""Largest difference from the golden outputs that a reload may show, relative to their largest value."""
_GOLDEN = 4
"""Samples (and, for text, last positions) whose outputs are kept."""
_GOLDEN_TOKENS = 32


def export(recipe: Recipe, state: TrainingState, data: Datasets, out: Path) -> dict[str, Any]:
    """Write the export of a training state to `out` (replaced if it exists), load it back and compare.

    Returns:
        The contents of `headwater/export.json`.

    Raises:
        UserError: the reloaded encoder does not give the same outputs, or `out` is something else than an
            export, which is not replaced.
    """
    out = out.resolve()
    if out.exists() and not (out / "headwater" / "export.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no export of ours; choose another folder")
    temporary = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "headwater").mkdir(parents=True)
    try:
        about = _write(recipe, state, data, temporary)
        check(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(out, ignore_errors=True)
    os.replace(temporary, out)
    sync(out.parent)
    return about


def export_run(run: Path, out: Path) -> dict[str, Any]:
    """Export the newest good checkpoint of a run folder; see `export`.

    Raises:
        UserError: `run` is no run folder or has no good checkpoint, or its data are gone.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run} is no run folder: it has no recipe.yaml")
    recipe = load_recipe(run / "recipe.yaml")
    path = choose(run / "checkpoints", "auto")
    if path is None:
        raise UserError(f"{run} has no checkpoint yet; let it run until its first one (watch.checkpoint_every)")
    data = open_data(recipe)
    objective = build_objective(recipe)
    average = start_average(objective.exported()) if recipe.train.ema is not None else None
    state = TrainingState(objective, build_optimizer(objective, recipe.optimizer), average, scaler=None)
    state.restore(path, recipe, data.facts)
    return export(recipe, state, data, out)


def check(folder: Path) -> None:
    """Load an export with the library whose layout it has and compare with the golden outputs.

    Raises:
        UserError: a file does not match its checksum, or the outputs differ by more than `TOLERANCE`.
    """
    about = read_about(folder)
    for name, digest in about["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise UserError(f"{folder / name} is missing or has changed since it was exported; export the run again")
    golden = load_file(folder / "headwater" / "golden.safetensors")
    outputs = _foreign_outputs(folder, about["kind"], golden)
    worst = (outputs - golden["outputs"]).abs().max().item()
    if not worst <= TOLERANCE * max(1.0, golden["outputs"].abs().max().item()):
        raise UserError(f"{folder} fails its self-test: outputs differ from the golden ones by {worst:.2g}")


def exported_step(folder: Path) -> int | None:
    """The step whose weights an export holds; None where there is no whole export."""
    try:
        about = read_about(folder)
        whole = all(sha256(folder / name) == digest for name, digest in about["files"].items())
    except (UserError, OSError):
        return None
    return int(about["step"]) if whole else None


def read_about(folder: Path) -> dict[str, Any]:
    """`headwater/export.json` of an export; raises `UserError` when the folder is none."""
    path = folder / "headwater" / "export.json"
    if not path.is_file():
        raise UserError(f"{folder} is no headwater export: {path} is missing")
    try:
        about = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); export the run again") from None
    if about.get("format") != FORMAT:
        raise UserError(f"{folder} is of export format {about.get('format')}; this version reads {FORMAT}")
    return about


def _write(recipe: Recipe, state: TrainingState, data: Datasets, out: Path) -> dict[str, Any]:
    encoder = copy.deepcopy(state.encoder()).cpu().float().eval()
    if isinstance(recipe.encoder, VisionConfig):
        kind, facts = "images", _write_vision(recipe.encoder, encoder, data, recipe.data.canvas, out)
    else:
        assert isinstance(recipe.encoder, TextConfig)
        kind, facts = "text", _write_text(recipe.encoder, state, encoder, data, out)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.objective.state_dict().items()}
    save_file(weights, out / "headwater" / "objective.safetensors")
    about = {
        "format": FORMAT,
        "kind": kind,
        "objective": recipe.objective.name,
        "step": state.step,
        "samples": state.position,
        **facts,
        "dataset": {
            "fingerprint": data.train.fingerprint,
            "classes": data.train.classes,
            "size": len(data.train),
        },
        "headwater": _version(),
        "recipe": recipe.model_dump(mode="json"),
    }
    write_atomically(out / "README.md", model_card(recipe, about))
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "README.md")
    about["files"] = {str(path.relative_to(out)): sha256(path) for path in files}
    write_atomically(out / "headwater" / "export.json", json.dumps(about, indent=1))
    return about


@torch.no_grad()
def _write_vision(config: VisionConfig, encoder: nn.Module, data: Datasets, canvas: int, out: Path) -> dict[str, Any]:
    save_file({k: v.contiguous() for k, v in encoder.state_dict().items()}, out / "model.safetensors")
    described: dict[str, Any] = encoder.pretrained_cfg  # type: ignore[assignment]
    width = int(encoder.num_features)  # type: ignore[arg-type]
    size = config.image_size
    timm_config = {
        "architecture": config.model,
        "num_classes": 0,
        "num_features": width,
        "global_pool": config.pool,
        "model_args": timm_arguments(config),
        "pretrained_cfg": {
            "tag": "headwater",
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": bool(described.get("fixed_input_size", False)),
            "interpolation": config.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(config.mean),
            "std": list(config.std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": described.get("first_conv"),
            "classifier": described.get("classifier"),
        },
    }
    write_atomically(out / "config.json", json.dumps(timm_config, indent=1))
    batch = next(sequential(data.train, _GOLDEN, canvas=canvas, ids=data.train.all_ids()[:_GOLDEN]))
    images = eval_view(batch, config)
    _save_golden(images, encoder(images), out)
    return {
        "features": width,
        "image_size": size,
        "canvas": canvas,
        "mean": list(config.mean),
        "std": list(config.std),
        "interpolation": config.interpolation,
    }


@torch.no_grad()
def _write_text(
    config: TextConfig, state: TrainingState, encoder: nn.Module, data: Datasets, out: Path
) -> dict[str, Any]:
    objective = copy.deepcopy(state.objective).cpu().float().eval()
    assert isinstance(objective, TextObjective | ReplacedToken)
    objective.encoder = encoder  # type: ignore[assignment]
    files = export_files(objective.state_dict(), config, data.train.folder / "tokenizer.json", objective.causal)
    for name, payload in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        write_atomically(out / name, payload)
    # A few positions of a few short rows: logits are wide.
    ids = data.train.all_ids()[:_GOLDEN]
    tokens = torch.stack([torch.from_numpy(data.train.row(int(i))) for i in ids])[:, :_GOLDEN_TOKENS]
    if isinstance(objective, TextObjective):
        outputs = objective.logits(tokens, last=_GOLDEN)
    else:  # no head that predicts tokens: the encoder alone
        outputs = encoder(tokens, causal=objective.causal)[:, -_GOLDEN:]
    _save_golden(tokens, outputs, out)
    return {"features": config.width, "context": config.context, "pooling": "mean", "causal": objective.causal}


def _save_golden(inputs: Tensor, outputs: Tensor, out: Path) -> None:
    golden = {"inputs": inputs.contiguous(), "outputs": outputs.float().contiguous()}
    save_file(golden, out / "headwater" / "golden.safetensors")


@torch.no_grad()
def _foreign_outputs(folder: Path, kind: str, golden: dict[str, Tensor]) -> Tensor:
    if kind == "images":
        import timm

        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return model(golden["inputs"])
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"][0].endswith("Model"):
        bare = AutoModel.from_pretrained(folder, use_safetensors=True).eval()
        return bare(golden["inputs"]).last_hidden_state[:, -golden["outputs"].shape[1] :].float()
    auto = AutoModelForCausalLM if config["model_type"] == "modernbert-decoder" else AutoModelForMaskedLM
    model = auto.from_pretrained(folder, use_safetensors=True).eval()
    return model(golden["inputs"]).logits[:, -golden["outputs"].shape[1] :].float()


def _version() -> str:
    try:
        return metadata.version("headwater")
    except metadata.PackageNotFoundError:
        return "unknown"
