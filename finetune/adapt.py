"""Domain adaptation: continued pre-training on the target's unlabelled data, then fine-tuning (Gururangan et al. 2020).

The encoder as it was is fine-tuned with the same labels, seeds and settings, so that what adaptation gave can be told.
Every part goes on from where a run that was stopped stood.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import write_atomically
from finetune.compare import Judged, judge_model
from finetune.encoder import load_encoder
from finetune.features import settled
from finetune.model import load_model
from finetune.results import FORMAT, kind_of, write_results
from finetune.run import finetune
from finetune.settings import Settings, settings_from
from finetune.strategies import strategy_from
from finetune.targets import task_from
from finetune.tasks import Report, Task, load_task, settle
from pretrain.evaluate import evaluate
from pretrain.export import read_about
from pretrain.loop import train as pretrain
from pretrain.recipe import Recipe
from pretrain.recipe_file import override_recipe
from pretrain.setup import prepare

LR_SHARE = 0.5
"""Peak learning rate of the continued pre-training, as a share of the first one's."""
STEPS_SHARE = 0.25
"""Its steps, as a share of those that the export has seen."""
_REQUEST = "adapt.json"


@dataclass(frozen=True)
class Target:
    """The domain to adapt to."""

    unlabelled: str
    """Shards to go on pre-training on."""
    train: str
    """Labelled data."""
    test: str | None = None
    """Labelled data to judge on; without it 20 % of `train` is held out."""
    source: str | None = None
    """Held-out shards of what the export was trained on, to measure what is forgotten."""


@dataclass(frozen=True)
class Plan:
    """How it is done."""

    strategy: str = "full"
    labels_per_class: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    lr_share: float = LR_SHARE
    steps: int | None = None
    recipe: tuple[str, ...] = ()
    """Further `key.sub=value` overrides of the export's own recipe."""
    task: str = "classification"
    """Kind of labels, one of `finetune.targets.TASKS`."""


def adapt(
    export: str | Path,
    target: Target,
    plan: Plan,
    output: str | Path,
    *,
    report: Report = print,
    **settings: Any,
) -> dict[str, Any]:
    """Adapt an export to a domain, fine-tune it and the export as it was, and compare them.

    Args:
        output: folder for the run (`pretraining/`), the models (`adapted/seed0`, `plain/seed0`, …), and
            `results.json`. One of the same request that was not finished is gone on with.
        settings: of fine-tuning, see `finetune.settings.Settings`.

    Returns:
        `adapted` and `plain` accuracy (or the task's own merit), `lead` with its paired interval over seeds and
        items, `pretraining` (held-out losses of target and source before and after), what `results.json` holds.

    Raises:
        UserError: data, recipe or settings that do not fit, or an `output` of another request.
        Preempted: it was told to stop; what was done is saved.
    """
    options, folder = settled(settings_from(settings)), Path(output).expanduser()
    strategy_from(plan.strategy)
    if not plan.seeds:
        raise UserError("adaptation is compared over one seed or more")
    source = Path(export).expanduser()
    recipe = recipe_for(source, target, plan, options.precision)
    task = load_task(target.train, target.test, load_encoder(source, options.pooling), task_from(plan.task))
    setup = prepare(recipe, folder)  # whatever does not fit is said before anything is written
    _begin(folder, _request(source, target, plan, options, task))
    before = _kept(folder / "before.json", lambda: evaluate(setup))
    adapted = pretrain(recipe, folder / "pretraining")
    moved = recipe.model_copy(update={"start": str(adapted)})
    after = _kept(folder / "after.json", lambda: evaluate(prepare(moved, folder)))
    judged = {
        name: _models(name, encoder, target, plan, settings, folder, report)
        for name, encoder in (("plain", source), ("adapted", adapted))
    }
    results: dict[str, Any] = {"format": FORMAT, "strategy": plan.strategy, "seeds": list(plan.seeds)}
    results |= kind_of(task.target)
    kind = type(judged["plain"][0])
    for name, each in judged.items():
        results[name] = kind.summary(each) | {"runs": [one.merit for one in each]}
    results["lead"] = kind.lead(judged["adapted"], judged["plain"])
    results["pretraining"] = {"recipe": recipe.model_dump(mode="json"), "before": before, "after": after}
    write_results(folder / "results.json", results)
    return results


def recipe_for(export: Path, target: Target, plan: Plan, precision: str | None = None) -> Recipe:
    """The export's own recipe, to go on with: its objective and encoder, lower peak rate, fewer steps.

    Held-out data of the target are what its shards bring, or the recipe's share of them; `watched.source` is the
    source's. Warm-ups of batch and context are over. Where fine-tuning has a `precision`, all is done in that.

    Raises:
        UserError: no export of ours, or overrides that make no recipe.
    """
    if plan.lr_share <= 0:
        raise UserError(f"a learning rate of {plan.lr_share} of the first one's trains nothing; give a positive share")
    about = read_about(export)
    tree = json.loads(json.dumps(about["recipe"]))
    tree["name"], tree["start"] = f"{tree['name']}_adapted", str(export)
    share = tree["data"].get("validation")
    watched = {} if target.source is None else {"source": target.source}
    tree["data"] |= {
        "train": target.unlabelled,
        "validation": share if isinstance(share, float) else None,
        "watched": watched,
    }
    tree["optimizer"]["lr"] *= plan.lr_share
    steps = plan.steps if plan.steps is not None else max(1, round(STEPS_SHARE * about["step"]))
    tree["train"] |= {"steps": steps, "epochs": None, "batch_warmup": None, "context_warmup": None}
    if precision is not None:
        tree["train"]["precision"] = precision
    tree["watch"] |= {"checkpoint_every": max(1, min(tree["watch"]["checkpoint_every"], steps // 4))}
    tree["watch"] |= {"evaluate_every": max(1, steps // 4)}
    return override_recipe(tree, list(plan.recipe), f"the recipe in {export}")


def _models(
    name: str, encoder: Path, target: Target, plan: Plan, settings: dict[str, Any], folder: Path, report: Report
) -> list[Judged]:
    """What the seeds' models say of the test items; they are trained where they are not there."""
    options, found, kind = settings_from(settings), list[Judged](), task_from(plan.task)
    task: Task | None = None
    for seed in plan.seeds:
        place = folder / name / f"seed{seed}"
        if not (place / "results.json").is_file():
            task = task or load_task(target.train, target.test, load_encoder(encoder, options.pooling), kind)
            chosen: dict[str, Any] = {"strategy": plan.strategy, "labels_per_class": plan.labels_per_class}
            finetune(encoder, task, seeds=[seed], output=place, report=_behind(name, report), **chosen, **settings)
        model = load_model(place)
        task = task or load_task(target.train, target.test, model.encoder, kind)
        settle(task.test, report)
        found.append(judge_model(name, model, task.test, options))
    return found


def _behind(name: str, report: Report) -> Report:
    return lambda text: report(f"{name}: {text}")


def _kept(path: Path, work: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `work` gives, computed once and kept in a file."""
    if not path.is_file():
        write_atomically(path, json.dumps(work(), indent=1))
    found: dict[str, float] = json.loads(path.read_text())
    return found


def _request(source: Path, target: Target, plan: Plan, settings: Settings, task: Task) -> dict[str, Any]:
    """What must be the same for results to belong together."""
    about = read_about(source)
    files = {name: about["files"][name] for name in sorted(about["files"]) if name.endswith(".safetensors")}
    return {
        "export": files,
        "target": asdict(target),
        "plan": _kept_plan(plan),
        "data": task.fingerprints,
        "settings": settings.model_dump(mode="json"),
    }


def _kept_plan(plan: Plan) -> dict[str, Any]:
    """As it was kept before there were other tasks, where it is a classification."""
    kept = asdict(plan) | {"recipe": list(plan.recipe)}
    return {name: kept[name] for name in kept if name != "task" or plan.task != "classification"}


def _begin(folder: Path, request: dict[str, Any]) -> None:
    """Claim `folder` for a request; raises `UserError` where it belongs to another."""
    path = folder / _REQUEST
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} already exists; remove it or choose another --output")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(request, indent=1))
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; choose a folder you own") from None
        return
    before = json.loads(path.read_text())
    differing = sorted(name for name in request if json.loads(json.dumps(request[name])) != before.get(name))
    if differing:
        raise UserError(f"{folder} holds an adaptation with another {' and '.join(differing)}; choose another --output")
