"""What each subcommand does; every heavy import waits until its command runs."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def quickstart(arguments: argparse.Namespace) -> int:
    """`headwater quickstart`."""
    from launch.quickstart import run

    run(arguments.kind, arguments.output, arguments.seeds)
    return 0


def shard_images(arguments: argparse.Namespace) -> int:
    """`headwater shard images`."""
    from data.image_shards import shard_images

    summary = shard_images(
        arguments.source,
        arguments.out,
        labels=arguments.labels,
        samples_per_shard=arguments.shard_size,
        overwrite=arguments.overwrite,
    )
    unreadable = summary["unreadable"]
    lines = [f"{summary['samples']:,} pictures of {len(summary['classes'])} classes in {arguments.out}"]
    lines += [f"left out {len(unreadable)} unreadable:"] if unreadable else []
    lines += [f"  {name}: {reason}" for name, reason in unreadable[:50]]
    lines += [f"  … and {len(unreadable) - 50} more"] if len(unreadable) > 50 else []
    lines.append(f"next: headwater pretrain RECIPE data.train={arguments.out}")
    return _tell(summary, "\n".join(lines), arguments)


def shard_text(arguments: argparse.Namespace) -> int:
    """`headwater shard text`."""
    from data.text import shard_text

    summary = shard_text(
        arguments.source,
        arguments.out,
        vocab_size=arguments.vocab_size,
        tokenizer=arguments.tokenizer,
        validation=arguments.validation,
        document=arguments.document,
        field=arguments.field,
        overwrite=arguments.overwrite,
        workers=arguments.workers,
    )
    held = summary["validation"]
    text = (
        f"{summary['tokens']:,} tokens of {summary['documents']:,} documents in {arguments.out} "
        f"({summary['bytes_per_token']:.2f} bytes a token, {summary['vocab_size']:,} token ids)\n"
        + (f"held out: {held['documents']:,} documents in {arguments.out / 'validation'}\n" if held else "")
        + (f"{summary['replaced']:,} undecodable places were replaced\n" if summary["replaced"] else "")
        + f"next: headwater pretrain next_token_small data.train={arguments.out}"
    )
    return _tell(summary, text, arguments)


def inspect(arguments: argparse.Namespace) -> int:
    """`headwater inspect`: exit status 1 when there are problems."""
    from data.inspect import inspect

    report = inspect(arguments.shards, verify=not arguments.fast)
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items())
        if name != "problems":
            lines.append(f"{name.replace('_', ' '):<18} {value:,}" if isinstance(value, int) else f"{name:<18} {value}")
    lines += [f"problem: {problem}" for problem in report["problems"]] or ["no problems found"]
    _tell(report, "\n".join(lines), arguments)
    return 1 if report["problems"] else 0


def pretrain(arguments: argparse.Namespace) -> int:
    """`headwater pretrain`: in this process, or through `accelerate launch` for several."""
    from launch.processes import launch, processes_for

    count = 1 if arguments.dry_run else processes_for(arguments.processes)
    if count == 1 and not arguments.max_restarts:
        from pretrain.__main__ import run

        return run(arguments)
    from pathlib import Path

    from pretrain.recipe_file import load_recipe

    # Read here as well: one process says what is wrong with a recipe, before others are started.
    output = arguments.output or Path("runs") / load_recipe(arguments.recipe, arguments.settings).name
    words = [arguments.recipe, *arguments.settings, "--resume", arguments.resume, "--output", str(output)]
    return launch(count, words, output, arguments.max_restarts)


def export(arguments: argparse.Namespace) -> int:
    """`headwater export`."""
    from pretrain.export import export_run

    about = export_run(arguments.run, arguments.out)
    text = f"step {about['step']:,} of {about['recipe']['name']} in {arguments.out}, self-test passed"
    return _tell(about, text, arguments)


def finetune(arguments: argparse.Namespace) -> int:
    """`headwater finetune`."""
    from finetune.run import finetune

    results = finetune(
        arguments.encoder,
        arguments.train,
        arguments.test,
        task=arguments.task,
        strategy=arguments.strategy,
        labels_per_class=arguments.labels_per_class,
        seeds=range(arguments.seeds),
        output=arguments.output,
        overwrite=arguments.overwrite,
        report=_to_stderr,
        **_settings(arguments.settings),
    )
    low, high = results["interval"]
    text = f"{arguments.strategy}: accuracy {results['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})"
    if arguments.output:
        text += f"\nmodel and results.json in {arguments.output}\nnext: headwater predict {arguments.output} FILES"
    return _tell(results, text, arguments)


def evaluate(arguments: argparse.Namespace) -> int:
    """`headwater evaluate`."""
    from finetune.run import evaluate

    results = evaluate(arguments.model, arguments.test, report=_to_stderr)
    low, high = results["interval"]
    return _tell(results, f"accuracy {results['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})", arguments)


def predict(arguments: argparse.Namespace) -> int:
    """`headwater predict`: exit status 1 when some inputs could not be read."""
    from finetune.model import load_model
    from finetune.predict import predict, write_rows

    found = predict(load_model(arguments.model), arguments.inputs)
    if arguments.output:
        write_rows(found, arguments.output)
        print(f"{len(found.rows):,} predictions in {arguments.output}")
    else:
        for row in found.rows:
            print(f"{row.input}\t{row.label}\t{row.probability:.4f}")
    if found.skipped:
        print(f"left out {len(found.skipped)} unreadable:", file=sys.stderr)
        for name, reason in found.skipped:
            print(f"  {name}: {reason}", file=sys.stderr)
    return 1 if found.skipped else 0


def status(arguments: argparse.Namespace) -> int:
    """`headwater status`: exit status 1 when a run has failed or fallen silent."""
    from launch.status import as_json, find_runs, read_status, table

    found = [read_status(run) for run in find_runs(arguments.runs)]
    print(json.dumps(as_json(found), indent=1) if arguments.json else table(found))
    return int(any(each.state in ("failed", "silent", "hung") for each in found))


def report(arguments: argparse.Namespace) -> int:
    """`headwater report`."""
    from launch.report import write_report

    print(write_report(arguments.run, pictures=not arguments.no_pictures))
    return 0


def _settings(pairs: list[str]) -> dict[str, Any]:
    import yaml

    from data.errors import UserError

    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{pair!r} is no setting; write key=value, such as epochs=10")
        settings[key] = yaml.safe_load(value)
    return settings


def _tell(result: dict[str, Any], text: str, arguments: argparse.Namespace) -> int:
    print(json.dumps(result, indent=1, default=str) if arguments.json else text)
    return 0


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
