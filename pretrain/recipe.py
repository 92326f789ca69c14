"""A recipe: one self-contained YAML file that says what a run is, checked before anything starts."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.errors import UserError
from pretrain.encoders.text import TextConfig
from pretrain.encoders.vision import VisionConfig
from pretrain.objectives.masked_image import MAEConfig
from pretrain.objectives.next_token import NextTokenConfig
from pretrain.optim import OptimizerConfig

FOLDER = Path(__file__).parent / "recipes"
_NUMBER = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+")


class DataConfig(BaseModel):
    """Where samples come from."""

    model_config = ConfigDict(extra="forbid")

    train: str | None = None
    """Folder or glob of shards."""
    validation: str | float | None = None
    """Held-out shards, or a share of `train` (pictures only). Text shards bring their own by default."""
    canvas: int = Field(default=256, ge=1)
    """Side of the square that pictures are decoded onto, in pixels; larger ones are shrunk to fit."""
    workers: int = Field(default=2, ge=0)
    """Reading and decoding processes for each training process; cannot change what is trained."""


class TrainConfig(BaseModel):
    """How long, how wide, how precise."""

    model_config = ConfigDict(extra="forbid")

    batch_size: int = Field(default=256, gt=0)
    """Samples (pictures, rows) of one global batch, over all processes."""
    steps: int | None = Field(default=None, gt=0)
    """Optimiser steps; give this or `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training samples; give this or `steps`."""
    microbatch: int | None = Field(default=None, gt=0)
    """Most samples a process holds at once; the rest of its share is accumulated."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision, by Accelerate."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    ema: float | None = Field(default=None, ge=0, lt=1)
    """Momentum of an average of the encoder's weights, which is then evaluated and exported."""
    compile: bool = False
    """torch.compile the objective."""
    deterministic: bool = False
    """Ask torch for deterministic kernels (a CPU run is exact without it)."""
    skips: int = Field(default=20, ge=0)
    """Steps in a row that may be skipped for a loss or gradient that is not finite, before the run stops."""


class WatchConfig(BaseModel):
    """What is measured, kept and shown while a run goes on; changes nothing in what is trained."""

    model_config = ConfigDict(extra="forbid")

    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: int = Field(default=500, ge=0)
    """Steps between two evaluations on held-out data (and at the end); 0 for never."""
    evaluate_samples: int = Field(default=2048, ge=1)
    """Most held-out samples of one evaluation."""
    knn_samples: int = Field(default=10_000, ge=0)
    """Most labelled training pictures in the bank of the online kNN probe; 0 for none."""
    knn_neighbours: int = Field(default=20, ge=1)
    """Neighbours that vote."""
    checkpoint_every: int = Field(default=500, ge=1)
    """Steps between two checkpoints (and at the end)."""
    checkpoint_keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept."""
    trackers: list[str] = Field(default_factory=list)
    """Accelerate's trackers: tensorboard, wandb, mlflow, …"""


Encoder = Annotated[VisionConfig | TextConfig, Field(discriminator="kind")]
ObjectiveConfig = Annotated[MAEConfig | NextTokenConfig, Field(discriminator="name")]


class Recipe(BaseModel):
    """Everything that defines a run."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Names the run's folder: letters, digits, `_`, `-` and dots."""
    seed: int = 0
    """Of the initial weights, the order of samples, views and masks."""
    data: DataConfig = Field(default_factory=DataConfig)
    encoder: Encoder
    objective: ObjectiveConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    watch: WatchConfig = Field(default_factory=WatchConfig)

    def steps(self, samples: int) -> int:
        """Optimiser steps of the whole run over a dataset of `samples`."""
        if self.train.steps is not None:
            return self.train.steps
        assert self.train.epochs is not None
        return max(1, round(self.train.epochs * samples / self.train.batch_size))

    def identity(self) -> dict[str, Any]:
        """The parts that decide what is trained: what a checkpoint must agree with to be resumed.

        Where the shards lie does not count (their fingerprint does), nor how the global batch is split.
        """
        whole = self.model_dump(mode="json", exclude={"name", "watch"})
        del whole["data"]["train"], whole["data"]["workers"]
        del whole["train"]["skips"], whole["train"]["microbatch"]
        if isinstance(self.data.validation, str):  # a share is cut off the training samples; other shards are not
            whole["data"]["validation"] = None
        return whole

    def hash(self) -> str:
        """Short hash of `identity`."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


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
    wanted = "text" if isinstance(recipe.objective, NextTokenConfig) else "vision"
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
