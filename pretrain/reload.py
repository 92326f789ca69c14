"""The whole objective back from an export: to look at what it predicts, or to continue pre-training."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from pretrain.build import build_objective
from pretrain.export import read_about
from pretrain.objectives.protocol import Objective
from pretrain.recipe import Recipe
from pretrain.recipe_file import parse_recipe


def load_objective(export: Path) -> tuple[Objective, Recipe]:
    """The objective, heads included, with its trained weights, and its recipe.

    Raises:
        UserError: `export` is no export, or of another version.
    """
    about = read_about(export)
    recipe = parse_recipe(about["recipe"], str(export / "headwater" / "export.json"))
    objective = build_objective(recipe)
    objective.load_state_dict(load_file(export / "headwater" / "objective.safetensors"))
    return objective.eval(), recipe
