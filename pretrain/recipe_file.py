"""Recipes as files: one self-contained YAML each, read with overrides and checked before anything starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data.errors import UserError
from pretrain.recipe import Recipe
from pretrain.recipe_errors import explain

FOLDER = Path(__file__).parent / "recipes"
_NUMBER = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+")


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, or one of ours by name, and apply `key.sub=value` overrides (values are YAML).

    Raises:
        UserError: no such recipe, no valid YAML, an unknown key (with the one that was probably meant),
            a value of the wrong type.
    """
    path = Path(source)
    if not path.is_file():
        path = FOLDER / f"{source}.yaml"
    if not path.is_file():
        known = sorted(recipe.stem for recipe in FOLDER.glob("*.yaml"))
        raise UserError(f"there is no recipe {str(source)!r}; give a YAML file or one of: {', '.join(known)}")
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is no recipe: it must hold keys such as encoder and objective")
    return override_recipe(tree, overrides or [], str(path))


def override_recipe(tree: dict[str, Any], overrides: list[str], origin: str) -> Recipe:
    """Apply `key.sub=value` overrides to a recipe's tree and check it; `origin` names it in errors.

    Raises:
        UserError: see `load_recipe`.
    """
    for override in overrides:
        _override(tree, override)
        if override.startswith("train.steps="):  # the two exclude each other: the later word counts
            tree["train"]["epochs"] = None
        if override.startswith("train.epochs="):
            tree["train"]["steps"] = None
    return parse_recipe(tree, origin)


def parse_recipe(tree: dict[str, Any], origin: str) -> Recipe:
    """Check a recipe's tree; `origin` names it in errors. Raises `UserError`."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(explain(problem, tree) for problem in error.errors())) from None
    if (recipe.train.steps is None) == (recipe.train.epochs is None):
        raise UserError(f"{origin}: give exactly one of train.steps and train.epochs")
    warmup = recipe.train.context_warmup
    if warmup is not None and (recipe.encoder.kind != "text" or not warmup.fits(recipe.encoder.context)):
        raise UserError(
            f"{origin}: train.context_warmup.start {warmup.start} must become encoder.context by doubling, "
            "and the encoder must be one for text"
        )
    wanted = recipe.objective.encoder_kind
    if recipe.encoder.kind != wanted:
        raise UserError(
            f"{origin}: objective {recipe.objective.name} needs an encoder of kind {wanted}, not {recipe.encoder.kind}"
        )
    return recipe


def _override(tree: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"{text!r} is no override; write key=value, such as train.steps=1000")
    *parents, last = path.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise UserError(f"override {text!r}: {parent} holds a value, not keys")
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"override {text!r}: {value!r} is no valid YAML value") from None
    if isinstance(node[last], str) and _NUMBER.fullmatch(node[last]):  # YAML 1.1 takes 1e-3 for a string
        node[last] = float(node[last])
