"""`headwater ensemble`, `soup` and `interpolate`: several task models as one."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch.output import tell, to_stderr
from launch.parsers import add_command, add_json, add_output


def add(sub: argparse._SubParsersAction) -> None:
    """Put these commands into the command line."""
    _ensemble(sub)
    _soup(sub)
    _interpolate(sub)


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
    parser = add_command(sub, "ensemble", ensemble, "several task models -> one that averages what they say")
    parser.add_argument("models", nargs="+", type=Path, metavar="model", help="folders that finetune --output made")
    parser.add_argument("--test", help="labelled data to judge it and each member on")
    parser.add_argument("--validation", help="labelled data that no member saw, to choose the weights on")
    parser.add_argument("--weights", metavar="W,W,…", help="given weights, one a model (default: all equal)")
    add_output(parser)


def _soup(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "soup", soup, "task models fine-tuned from one encoder -> one with their average weights")
    parser.add_argument("models", nargs="+", type=Path, metavar="model", help="folders that finetune --output made")
    parser.add_argument("--validation", required=True, help="labelled data that no model saw, to choose members on")
    parser.add_argument("--test", help="labelled data to judge soups, members and their ensemble on")
    parser.add_argument("--kind", default="greedy", help="which soup to save: greedy or uniform (default: greedy)")
    parser.add_argument("--train", help="training data, needed where the encoder has BatchNorm")
    add_output(parser)


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
    add_output(parser)


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
    from finetune.compare_text import table
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
        lines.append(table(results["test"]["models"], results.get("merit", "accuracy")))
    return tell(results, "\n".join(lines + _saved(arguments)), arguments)


def soup(arguments: argparse.Namespace) -> int:
    """`headwater soup`."""
    from finetune.compare_text import table, value
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
    found, merit = results["validation"], results.get("merit", "accuracy")
    lines = [f"validation: {value(merit, each[merit])}  {each['name']}" for each in found["members"]]
    sizes = {"greedy": len(results["kept"]), "uniform": len(found["members"])}
    lines += [f"validation: {value(merit, found[f'{n}_{merit}'])}  {n} soup of {size}" for n, size in sizes.items()]
    if "test" in results:
        lines.append(table(results["test"]["models"], merit))
    return tell(results, "\n".join(lines + _saved(arguments)), arguments)


def interpolate(arguments: argparse.Namespace) -> int:
    """`headwater interpolate`."""
    from finetune.compare_text import difference, named
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
    lines, merit = [f"alpha {results['alpha']:g} ({why})"], results.get("merit", "accuracy")
    for name, entry in results["leads"].items():
        lines.append(f"{name}: {named(merit, entry[merit])}")
        lines += [f"  over {lead['over']}: {difference(merit, lead)}" for lead in entry["leads"]]
    lines += [f"robustness curve in {plot}"] if plot is not None else []
    return tell(results, "\n".join(lines + _saved(arguments)), arguments)


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
