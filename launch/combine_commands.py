"""`headwater ensemble`, `soup` and `interpolate`: several task models as one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from launch.output import tell, to_stderr
from launch.parsers import add_command, add_json


def add(sub: argparse._SubParsersAction) -> None:
    """Put these commands into the command line."""
    _ensemble(sub)
    _soup(sub)
    _interpolate(sub)
    _multitask(sub)
    _adapt(sub)


def add_corrupt(kinds: argparse._SubParsersAction) -> None:
    """`headwater shard corrupt`, among the kinds of `headwater shard`."""
    parser = add_command(kinds, "corrupt", corrupt, "a corrupted copy of a set of pictures, to judge robustness on")
    parser.add_argument("source", help="shards of pictures")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--kind", default="noise", help="noise, blur, contrast, brightness or jpeg (default: noise)")
    parser.add_argument("--severity", type=int, default=3, help="1 (mild) to 5, as in CIFAR-10-C and ImageNet-C (3)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    add_json(parser)


def _ensemble(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "ensemble", ensemble, "several task models -> one that averages their probabilities")
    parser.add_argument("models", nargs="+", type=Path, metavar="model", help="folders that finetune --output made")
    parser.add_argument("--test", help="labelled data to judge it and each member on")
    parser.add_argument("--validation", help="labelled data that no member saw, to choose the weights on")
    parser.add_argument("--weights", metavar="W,W,…", help="given weights, one a model (default: all equal)")
    _output(parser)


def _soup(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "soup", soup, "task models fine-tuned from one encoder -> one with their average weights")
    parser.add_argument("models", nargs="+", type=Path, metavar="model", help="folders that finetune --output made")
    parser.add_argument("--validation", required=True, help="labelled data that no model saw, to choose members on")
    parser.add_argument("--test", help="labelled data to judge soups, members and their ensemble on")
    parser.add_argument("--kind", default="greedy", help="which soup to save: greedy or uniform (default: greedy)")
    parser.add_argument("--train", help="training data, needed where the encoder has BatchNorm")
    _output(parser)


def _interpolate(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "interpolate", interpolate, "the models between a probe and its fine-tuned successor")
    parser.add_argument("probe", type=Path, help="model with the encoder as it was (finetune --strategy linear)")
    parser.add_argument("tuned", type=Path, help="model fine-tuned from the same encoder, best by --strategy lp-ft")
    parser.add_argument("--test", help="labelled data like the training data")
    parser.add_argument(
        "--shifted", nargs="+", default=[], metavar="DATA", help="the same classes as they look elsewhere"
    )
    parser.add_argument("--validation", help="labelled data that no model saw, to choose alpha on (without it: 0.5)")
    parser.add_argument("--steps", type=int, default=11, help="models on the way, ends included (default: 11)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="robustness curve (default: OUTPUT/robustness.png)")
    parser.add_argument("--train", help="training data, needed where the encoder has BatchNorm")
    _output(parser)


def _multitask(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "multitask", multitask, "several tasks over one encoder, beside each alone")
    parser.add_argument("encoder", help="an export's folder")
    parser.add_argument(
        "settings",
        nargs="+",
        metavar="NAME=TRAIN[:TEST]",
        help="tasks, by any name that is no setting; and settings of fine-tuning (key=value)",
    )
    parser.add_argument("--sampling", default="proportional", help="proportional, equal or temperature (proportional)")
    parser.add_argument("--temperature", type=float, default=2.0, help="of --sampling temperature (default: 2)")
    parser.add_argument("--labels-per-class", type=int, metavar="N", help="label budget of each task")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions (default: 1)")
    _output(parser)


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
    parser.add_argument("--labels-per-class", type=int, metavar="N", help="label budget (default: all labels)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of fine-tuning (default: 3)")
    parser.add_argument("--lr-share", type=float, default=0.5, help="of the first pre-training's peak rate (0.5)")
    parser.add_argument("--steps", type=int, help="of continued pre-training (default: a quarter of the first one's)")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything; the same command resumes")
    add_json(parser)


def corrupt(arguments: argparse.Namespace) -> int:
    """`headwater shard corrupt`."""
    from data.corruptions import corrupt

    done = corrupt(
        arguments.source,
        arguments.out,
        arguments.kind,
        arguments.severity,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    lines = [f"{done['samples']:,} pictures with {arguments.kind} of severity {arguments.severity} in {arguments.out}"]
    lines += [f"left out {name}: {reason}" for name, reason in done["unreadable"][:50]]
    lines.append(f"next: headwater evaluate MODEL {arguments.out}")
    return tell(done, "\n".join(lines), arguments)


def ensemble(arguments: argparse.Namespace) -> int:
    """`headwater ensemble`."""
    from finetune.compare import table
    from finetune.ensemble import ensemble

    results = ensemble(
        arguments.models,
        arguments.test,
        validation=arguments.validation,
        weights=_weights(arguments.weights),
        output=arguments.output,
        overwrite=arguments.overwrite,
        report=to_stderr,
    )
    lines = [f"weight {member['weight']:.3f}  {member['name']}" for member in results["members"]]
    if "test" in results:
        lines.append(table(results["test"]["models"]))
    return tell(results, "\n".join(lines + _saved(arguments)), arguments)


def soup(arguments: argparse.Namespace) -> int:
    """`headwater soup`."""
    from finetune.compare import table
    from finetune.soup import soup

    results = soup(
        arguments.models,
        arguments.validation,
        arguments.test,
        kind=arguments.kind,
        train=arguments.train,
        output=arguments.output,
        overwrite=arguments.overwrite,
        report=to_stderr,
    )
    found = results["validation"]
    lines = [f"validation: {100 * each['accuracy']:.1f} %  {each['name']}" for each in found["members"]]
    lines.append(f"validation: {100 * found['greedy_accuracy']:.1f} %  greedy soup of {len(results['kept'])}")
    lines.append(f"validation: {100 * found['uniform_accuracy']:.1f} %  uniform soup of {len(found['members'])}")
    if "test" in results:
        lines.append(table(results["test"]["models"]))
    return tell(results, "\n".join(lines + _saved(arguments)), arguments)


def interpolate(arguments: argparse.Namespace) -> int:
    """`headwater interpolate`."""
    from finetune.compare import percent
    from finetune.interpolate import interpolate

    results = interpolate(
        arguments.probe,
        arguments.tuned,
        arguments.test,
        shifted=arguments.shifted,
        validation=arguments.validation,
        steps=arguments.steps,
        train=arguments.train,
        output=arguments.output,
        overwrite=arguments.overwrite,
        report=to_stderr,
    )
    plot = arguments.plot or (arguments.output / "robustness.png" if arguments.output else None)
    if plot is not None:
        from launch.robustness import draw

        draw(results, plot)
    why = "chosen on validation data" if results["chosen_on_validation"] else "no validation data to choose on"
    lines = [f"alpha {results['alpha']:g} ({why})"]
    for name, entry in results["leads"].items():
        lines.append(f"{name}: accuracy {100 * entry['accuracy']:.1f} %")
        for lead in entry["leads"]:
            difference = f"{100 * lead['difference']:+.1f} ({percent(lead['interval'])})"
            lines.append(f"  over {lead['over']}: {difference} points, paired")
    lines += [f"robustness curve in {plot}"] if plot is not None else []
    return tell(results, "\n".join(lines + _saved(arguments)), arguments)


def multitask(arguments: argparse.Namespace) -> int:
    """`headwater multitask`."""
    from data.errors import UserError
    from finetune.compare import percent
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
        joint, alone, lead = found["joint"], found["alone"], found["lead"]
        difference = f"{100 * lead['difference']:+.1f} ({percent(lead['interval'])})"
        accuracies = f"{100 * joint['accuracy']:.1f} % together, {100 * alone['accuracy']:.1f} % alone"
        lines.append(f"{name}: {accuracies}, {difference} points, paired")
    if arguments.output:
        first = next(iter(tasks))
        lines += [
            f"a model for each task in {arguments.output}",
            f"next: headwater predict {arguments.output}/{first} FILES",
        ]
    return tell(results, "\n".join(lines), arguments)


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
    )
    plain = settings_of([pair for pair in arguments.settings if pair not in dotted])
    try:
        results = adapt(arguments.export, target, plan, arguments.output, report=to_stderr, **plain)
    except Preempted as stop:
        to_stderr(f"headwater: stopped ({stop.reason}); the same command goes on from there")
        return stop.status
    return tell(results, _adapted(results, arguments.output), arguments)


def _adapted(results: dict[str, Any], output: Path) -> str:
    from finetune.compare import percent

    lines = []
    for name, words in (("plain", "as it was"), ("adapted", "adapted")):
        low, high = (100 * bound for bound in results[name]["interval"])
        lines.append(f"{words:<10} accuracy {100 * results[name]['accuracy']:.1f} % ({low:.1f} to {high:.1f})")
    lead = results["lead"]
    lines.append(f"adaptation gave {100 * lead['difference']:+.1f} points ({percent(lead['interval'])}), paired")
    before, after = results["pretraining"]["before"], results["pretraining"]["after"]
    for name, words in (("validation_loss", "held-out loss of the domain"), ("source_loss", "of the source")):
        if name in before:
            lines.append(f"{words}: {before[name]:.4f} before, {after[name]:.4f} after")
    return "\n".join([*lines, f"everything is in {output}", f"next: headwater predict {output}/adapted/seed0 FILES"])


def _weights(text: str | None) -> list[float] | None:
    from data.errors import UserError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--weights {text} are no numbers; write one a model, such as 2,1,1") from None


def _saved(arguments: argparse.Namespace) -> list[str]:
    if arguments.output is None:
        return []
    return [f"model and results.json in {arguments.output}", f"next: headwater predict {arguments.output} FILES"]


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help="folder for the model and results.json")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    add_json(parser)
