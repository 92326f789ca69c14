"""Recipes as files: one self-contained YAML each, read with overrides and checked before anything starts."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from data.errors import UserError
from pretrain.recipe import Recipe

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
    for override in overrides or []:
        _override(tree, override)
        if override.startswith("train.steps="):  # the two exclude each other: the later word counts
            tree["train"]["epochs"] = None
        if override.startswith("train.epochs="):
            tree["train"]["steps"] = None
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], origin: str) -> Recipe:
    """Check a recipe's tree; `origin` names it in errors. Raises `UserError`."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(_explain(problem, tree) for problem in error.errors())) from None
    if (recipe.train.steps is None) == (recipe.train.epochs is None):
        raise UserError(f"{origin}: give exactly one of train.steps and train.epochs")
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


def _explain(problem: Any, tree: dict[str, Any]) -> str:
    """One clause of pydantic's errors, in words and with a suggestion."""
    # pydantic names the chosen kind behind its section; the recipe itself has no such level.
    place = [part for level, part in enumerate(problem["loc"]) if level != 1 or part not in _TAGS]
    where = ".".join(str(part) for part in place)
    if problem["type"] == "extra_forbidden":
        known = _fields_at(place[:-1], tree)
        close = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.6)
        elsewhere = [path for path in _paths(tree) if path.rpartition(".")[2] == place[-1]]
        meant = [".".join(map(str, [*place[:-1], close[0]]))] if close else elsewhere
        hint = f"did you mean {' or '.join(meant)}?" if meant else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {where!r}; {hint}"
    if problem["type"] == "missing":
        return f"{where!r} is missing"
    if problem["type"].startswith("union_tag"):
        key = problem["ctx"]["discriminator"].strip("'")
        given = problem["input"].get(key)
        return f"{where + '.' + key!r} is {given!r}; it must be one of: {', '.join(_tags(where))}"
    given = problem.get("input")
    return f"{where!r} is {given!r}: {problem['msg'].lower()}"


def _tags(section: str) -> list[str]:
    """The kinds that a section can be of."""
    key = "kind" if section == "encoder" else "name"
    options = get_args(Recipe.model_fields[section].annotation)
    return [tag for option in options for tag in get_args(option.model_fields[key].annotation)]


_TAGS = frozenset(_tags("encoder") + _tags("objective"))


def _fields_at(place: list[Any], tree: dict[str, Any]) -> list[str]:
    model: Any = Recipe
    for part in place:
        field = model.model_fields[part]
        options = get_args(field.annotation) or (field.annotation,)
        tree = tree[part] if isinstance(tree.get(part), dict) else {}
        chosen = [o for o in options if not _disagrees(o, tree)]
        model = chosen[0] if chosen else options[0]
    return list(model.model_fields)


def _paths(tree: dict[str, Any]) -> list[str]:
    """Every key that a recipe like `tree` may have, dotted."""
    sections = [name for name in Recipe.model_fields if name not in ("name", "seed")]
    return [f"{section}.{field}" for section in sections for field in _fields_at([section], tree)]


def _disagrees(option: Any, tree: dict[str, Any]) -> bool:
    """Whether a discriminated option is not the one that `tree` names."""
    for key in ("kind", "name"):
        field = option.model_fields.get(key)
        if field is not None and key in tree and tree[key] not in get_args(field.annotation):
            return True
    return False
