"""What is wrong with a recipe, in words and with the key that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pretrain.recipe import Recipe

_DISCRIMINATORS = ("kind", "name")


@dataclass
class Place:
    """Where in a recipe an error lies: found by walking the types along the error's path."""

    path: list[str] = field(default_factory=list)
    """Keys as a user writes them, without the names of chosen union members that pydantic puts between."""
    models: list[type[BaseModel]] = field(default_factory=list)
    """What the last key's section could be: one model, but for a union where none was chosen."""
    value: Any = None
    """What stands there: None where nothing does."""


def explain(problem: Any, tree: dict[str, Any]) -> str:
    """One clause for one of pydantic's errors about `tree`."""
    unknown = problem["type"] == "extra_forbidden"
    *parents, last = problem["loc"] if unknown else (*problem["loc"], "")
    place = find(parents, tree)
    if unknown:
        return _unknown(place, str(last), tree)
    where = ".".join(place.path)
    if problem["type"] == "missing":
        return f"{where!r} is missing"
    if problem["type"].startswith("union_tag"):
        key = problem["ctx"]["discriminator"].strip("'")
        tags = [tag for model in place.models for tag in _tags(model)]
        return f"{where + '.' + key!r} is {problem['input'].get(key)!r}; it must be one of: {', '.join(map(str, tags))}"
    return f"{where!r} is {problem.get('input')!r}: {problem['msg'].lower()}"


def find(location: list[Any], tree: Any) -> Place:
    """The place of pydantic's `location` in `tree`."""
    place, kind, rest = Place(models=[Recipe], value=tree), None, list(location)
    while rest:
        part = rest.pop(0)
        fields = place.models[0].model_fields if len(place.models) == 1 else {}
        if part not in fields and not _holds(place.value, part):
            break  # the name of a type: pydantic says so which member of a plain union it tried
        kind = fields[part] if part in fields else _item(kind)
        place.path.append(str(part))
        place.value = place.value[part] if _holds(place.value, part) else None
        place.models = _models(kind)
        if len(place.models) > 1 and rest:  # the name of the member that was chosen, which no user wrote there
            place.models = [model for model in place.models if rest[0] in _tags(model)] or place.models
            rest = rest[1:] if len(place.models) == 1 else rest
        else:
            place.models = _chosen(place.models, place.value)
    return place


def _unknown(place: Place, key: str, tree: dict[str, Any]) -> str:
    known = sorted({name for model in place.models for name in model.model_fields})
    where = ".".join([*place.path, key])
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    elsewhere = [path for path in _paths(tree) if path.rpartition(".")[2] == key]
    meant = [".".join([*place.path, close[0]])] if close else elsewhere
    hint = f"did you mean {' or '.join(meant)}?" if meant else f"known keys: {', '.join(known)}"
    return f"unknown key {where!r}; {hint}"


def _paths(tree: dict[str, Any]) -> Iterator[str]:
    """Every key of the sections that a recipe like `tree` may have, dotted."""
    for section, info in Recipe.model_fields.items():
        for model in _chosen(_models(info), tree.get(section))[:1]:
            yield from (f"{section}.{name}" for name in model.model_fields)


def _holds(value: Any, part: Any) -> bool:
    if isinstance(value, list | tuple):
        return isinstance(part, int) and part < len(value)
    return isinstance(value, dict) and part in value


def _chosen(options: list[type[BaseModel]], value: Any) -> list[type[BaseModel]]:
    """The options that have the value's own `kind` or `name`; all where it names none of them."""
    named = {value.get(key) for key in _DISCRIMINATORS} if isinstance(value, dict) else set()
    return [option for option in options if not named.isdisjoint(_tags(option))] or options


def _tags(option: type[BaseModel]) -> tuple[Any, ...]:
    """What an option's `kind` or `name` may be, where that tells it from others."""
    annotations = [option.model_fields[key].annotation for key in _DISCRIMINATORS if key in option.model_fields]
    return next((get_args(kind) for kind in annotations if get_origin(kind) is Literal), ())


def _models(kind: Any) -> list[type[BaseModel]]:
    """The models that a field's type allows."""
    kind = _bare(kind)
    if get_origin(kind) in (Union, UnionType):
        return [model for option in get_args(kind) for model in _models(option)]
    return [kind] if isinstance(kind, type) and issubclass(kind, BaseModel) else []


def _item(kind: Any) -> Any:
    """The type of the items of a list, tuple or mapping."""
    kind = _bare(kind)
    if get_origin(kind) in (Union, UnionType):
        return next((_item(option) for option in get_args(kind) if option is not NoneType), Any)
    return get_args(kind)[-1] if get_origin(kind) in (list, tuple, dict) and get_args(kind) else Any


def _bare(kind: Any) -> Any:
    """A type without the field or annotation around it."""
    if isinstance(kind, FieldInfo):
        kind = kind.annotation
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind
