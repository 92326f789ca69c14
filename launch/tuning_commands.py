"""`headwater multitask` and `adapt`: fine-tunings that take more than labels of one task, beside plain ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.output import tell, to_stderr
from launch.parsers import add_command, add_json, add_output


def add(sub: argparse._SubParsersAction) -> None:
    """Put these commands into the command line."""
    _multitask(sub)
    _adapt(sub)


def _multitask(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "multitask", multitask, "several tasks over one encoder, beside each alone")
    parser.add_argument("encoder", help="an export's folder")
    parser.add_argument(
        "settings",
        nargs="+",
        metavar="NAME=TRAIN[:TEST]",
        help="tasks, by any name that is no setting; and settings of fine-tuning (key=value)",
    )
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME=KIND",
        help="a task that is no classification: multi-label, regression, tokens, segmentation; for each such task",
    )
    parser.add_argument("--sampling", default="proportional", help="proportional, equal or temperature (proportional)")
    parser.add_argument("--temperature", type=float, default=2.0, help="of --sampling temperature (default: 2)")
    parser.add_argument("--labels-per-class", type=int, metavar="N", help="label budget of each task")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions (default: 1)")
    add_output(parser)


def _adapt(sub: argparse._SubParsersAction) -> None:
    parser = add_command(
        sub, "adapt", adapt, "go on pre-training on a domain's unlabelled data, fine-tune, and compare"
    )
    parser.add_argument("export", type=Path, help="an export of ours")
    parser.add_argument("unlabelled", help="shards of the domain (text: made with the export's tokenizer)")
    parser.add_argument("train", help="labelled data of the domain")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="with a dot: of the continued pre-training (train.batch_size=64); without: of fine-tuning (lr=1e-3)",
    )
    parser.add_argument("--test", help="labelled data to judge on (default: 20 %% of TRAIN is held out)")
    parser.add_argument("--source", metavar="SHARDS", help="held-out shards like those before: what is forgotten")
    parser.add_argument("--strategy", default="full", help="of fine-tuning (default: full)")
    parser.add_argument(
        "--task", default="classification", help="kind of labels, as `finetune` has it (classification)"
    )
    parser.add_argument("--labels-per-class", type=int, metavar="N", help="label budget (default: all labels)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of fine-tuning (default: 3)")
    parser.add_argument("--lr-share", type=float, default=0.5, help="of the first pre-training's peak rate (0.5)")
    parser.add_argument("--steps", type=int, help="of continued pre-training (default: a quarter of the first one's)")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything; the same command resumes")
    add_json(parser)


def multitask(arguments: argparse.Namespace) -> int:
    """`headwater multitask`."""
    from data.errors import UserError
    from finetune.compare_text import difference, value
    from finetune.multitask import multitask
    from finetune.settings import Settings
    from launch.task_commands import settings_of

    pairs = [pair for pair in arguments.settings if pair.partition("=")[0] not in Settings.model_fields]
    tasks: dict[str, tuple[str, str | None]] = {}
    for pair in pairs:
        name, equals, data = pair.partition("=")
        if not equals or not data:
            raise UserError(f"{pair!r} is no task; write NAME=TRAIN or NAME=TRAIN:TEST")
        if name in tasks:
            raise UserError(f"two tasks are named {name!r}; give each a name of its own")
        train, colon, test = data.rpartition(":")
        tasks[name] = (train, test) if colon and not test.startswith("//") else (data, None)
    results = multitask(
        arguments.encoder,
        tasks,
        kinds=_kinds(arguments.task),
        sampling=arguments.sampling,
        temperature=arguments.temperature,
        labels_per_class=arguments.labels_per_class,
        seeds=range(arguments.seeds),
        output=arguments.output,
        overwrite=arguments.overwrite,
        report=to_stderr,
        **settings_of([pair for pair in arguments.settings if pair not in pairs]),
    )
    lines = []
    for name, found in results["tasks"].items():
        merit = found.get("merit", "accuracy")
        joint, alone = (value(merit, found[how][merit]) for how in ("joint", "alone"))
        lines.append(f"{name}: {joint} together, {alone} alone, {difference(merit, found['lead'])}")
    if arguments.output:
        first = next(iter(tasks))
        lines += [
            f"a model for each task in {arguments.output}",
            f"next: headwater predict {arguments.output}/{first} FILES",
        ]
    return tell(results, "\n".join(lines), arguments)


def _kinds(pairs: list[str]) -> dict[str, str]:
    from data.errors import UserError

    kinds = {}
    for pair in pairs:
        name, equals, kind = pair.partition("=")
        if not equals or name in kinds:
            raise UserError(f"--task {pair} is no kind of a task; write NAME=KIND, such as words=tokens, once for each")
        kinds[name] = kind
    return kinds


def adapt(arguments: argparse.Namespace) -> int:
    """`headwater adapt`: exit status 75 when it was told to stop."""
    from finetune.adapt import Plan, Target, adapt
    from launch.task_commands import settings_of
    from pretrain.preemption import Preempted, leave_when_asked

    leave_when_asked()
    target = Target(arguments.unlabelled, arguments.train, arguments.test, arguments.source)
    dotted = tuple(pair for pair in arguments.settings if "." in pair.partition("=")[0])
    plan = Plan(
        arguments.strategy,
        arguments.labels_per_class,
        tuple(range(arguments.seeds)),
        arguments.lr_share,
        arguments.steps,
        dotted,
        arguments.task,
    )
    plain = settings_of([pair for pair in arguments.settings if pair not in dotted])
    try:
        results = adapt(arguments.export, target, plan, arguments.output, report=to_stderr, **plain)
    except Preempted as stop:
        to_stderr(f"headwater: stopped ({stop.reason}); the same command goes on from there")
        return stop.status
    return tell(results, _adapted(results, arguments.output), arguments)


def _adapted(results: dict[str, Any], output: Path) -> str:
    from finetune.compare_text import difference, value

    merit, lines = results.get("merit", "accuracy"), []
    for name, words in (("plain", "as it was"), ("adapted", "adapted")):
        low, high = results[name]["interval"]
        if merit == "accuracy":
            shown = f"accuracy {value(merit, results[name][merit])} ({100 * low:.1f} to {100 * high:.1f})"
        else:
            shown = f"{value(merit, results[name][merit])} ({low:.3f} to {high:.3f})"
        lines.append(f"{words:<10} {shown}")
    lines.append(f"adaptation gave {difference(merit, results['lead'])}")
    before, after = results["pretraining"]["before"], results["pretraining"]["after"]
    for name, words in (("validation_loss", "held-out loss of the domain"), ("source_loss", "of the source")):
        if name in before:
            lines.append(f"{words}: {before[name]:.4f} before, {after[name]:.4f} after")
    return "\n".join([*lines, f"everything is in {output}", f"next: headwater predict {output}/adapted/seed0 FILES"])
