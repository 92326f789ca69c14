"""`headwater export`: runs, encoders and task models in other tools' formats."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from launch.output import tell
from launch.parsers import add_command, add_json

FORMATS = ("timm", "transformers", "torchvision", "onnx", "torch")


def add(sub: argparse._SubParsersAction) -> None:
    """Put `export` into the command line."""
    text = (
        "a run's newest checkpoint, or a fine-tuned model -> a folder for timm, transformers, torchvision, ONNX, torch"
    )
    parser = add_command(sub, "export", export, text)
    parser.add_argument("source", metavar="source", help="run folder, folder that finetune --output made, or an export")
    parser.add_argument("out", type=Path, help="folder to make or replace")
    parser.add_argument("--format", choices=FORMATS, help="default: timm for pictures, transformers for text")
    add_json(parser)


def export(arguments: argparse.Namespace) -> int:
    """`headwater export`."""
    source = Path(arguments.source).expanduser()
    if any((source / name).is_file() for name in ("task.json", "ensemble.json", "config.json")):
        return _model(source, arguments)
    from pretrain.export import export_run

    if arguments.format is None or arguments.format == _own(source):
        about = export_run(source, arguments.out)
        text = f"step {about['step']:,} of {about['recipe']['name']} in {arguments.out}, self-test passed"
        return tell(about, text, arguments)
    with tempfile.TemporaryDirectory() as folder:
        export_run(source, Path(folder) / "export")
        return _model(Path(folder) / "export", arguments)


def _own(run: Path) -> str | None:
    """The format in which a run is exported anyway; None where `run` is none, which `export_run` says."""
    from pretrain.encoders.vision import VisionConfig
    from pretrain.recipe_file import load_recipe

    if not (run / "recipe.yaml").is_file():
        return None
    return "timm" if isinstance(load_recipe(run / "recipe.yaml").encoder, VisionConfig) else "transformers"


def _model(source: Path, arguments: argparse.Namespace) -> int:
    from finetune.export_model import export_model

    about: dict[str, Any] = export_model(source, arguments.out, arguments.format)
    what = f"a model for {about['task']}" if about["task"] != "features" else "an encoder"
    worst = about["worst_difference"]
    text = f"{what} as {about['layout']} in {arguments.out}, self-test passed (largest difference {worst:.1e})"
    return tell(about, f"{text}\nnext: read {arguments.out / 'README.md'}, whose code runs there", arguments)
