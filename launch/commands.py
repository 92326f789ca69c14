"""What each subcommand does; every heavy import waits until its command runs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any


def quickstart(arguments: argparse.Namespace) -> int:
    """`headwater quickstart`."""
    from launch.quickstart import run

    run(arguments.kind, arguments.output, arguments.seeds)
    return 0


def shard_images(arguments: argparse.Namespace) -> int:
    """`headwater shard images`."""
    import os

    from data.image_shards import Choices, shard_images
    from data.parts import parse_part
    from data.reencode import Remaking

    choices = Choices(
        labels=arguments.labels,
        samples_per_shard=arguments.shard_size,
        remaking=Remaking(arguments.resize, arguments.quality),
        dedup=arguments.dedup,
        beside=tuple(arguments.beside),
    )
    summary = shard_images(
        arguments.source,
        arguments.out,
        choices,
        workers=arguments.workers if arguments.workers is not None else os.cpu_count() or 1,
        part=parse_part(arguments.part) if arguments.part else None,
        overwrite=arguments.overwrite,
    )
    if summary.get("already"):
        return _tell(summary, f"part {arguments.part} of {arguments.out} is already done", arguments)
    lines = [f"{summary['samples']:,} pictures of {len(summary['classes'])} classes in {arguments.out}"]
    if "remade" in summary:
        side = f"shorter side at most {summary['shorter_side']}, " if summary["shorter_side"] else ""
        lines.append(
            f"{summary['remade']:,} encoded anew ({side}JPEG quality {summary['jpeg_quality']}): "
            f"{summary['bytes_read']:,} bytes became {summary['bytes_stored']:,}"
        )
    if "duplicates" in summary:
        disputed = f", {summary['disputed']:,} of them under another label" if summary["disputed"] else ""
        lines.append(f"{summary['duplicates']:,} duplicates left out{disputed}")
    lines += _unreadable(summary["unreadable"])
    return _tell(summary, "\n".join([*lines, _next_of_shards(arguments, "RECIPE")]), arguments)


def _unreadable(found: list[tuple[str, str]]) -> list[str]:
    lines = [f"left out {len(found)} unreadable:"] if found else []
    lines += [f"  {name}: {reason}" for name, reason in found[:50]]
    return lines + ([f"  … and {len(found) - 50} more"] if len(found) > 50 else [])


def _next_of_shards(arguments: argparse.Namespace, recipe: str) -> str:
    if getattr(arguments, "part", None):
        return f"next, when all parts are done: headwater shard merge {arguments.out}"
    return f"next: headwater pretrain {recipe} data.train={arguments.out}"


def shard_convert(arguments: argparse.Namespace) -> int:
    """`headwater shard convert`."""
    from dataclasses import asdict

    from data.convert import Reading, convert

    done = convert(
        arguments.source,
        arguments.out,
        Reading(arguments.salvage, arguments.last_dot),
        samples_per_shard=arguments.shard_size,
        overwrite=arguments.overwrite,
    )
    lines = [f"{done.samples:,} samples in {done.shards:,} shards in {arguments.out}"]
    lines += [f"salvaged, not whole: {sentence}" for sentence in done.damaged]
    lines += [f"left out {done.without_picture:,} samples without a picture"] if done.without_picture else []
    lines += [f"left out {count:,} parts named .{part}" for part, count in sorted(done.other_parts.items())[:20]]
    lines += [f"renamed {done.renamed:,} samples whose key was taken"] if done.renamed else []
    lines += _unreadable(done.unreadable)
    return _tell(asdict(done), "\n".join([*lines, _next_of_shards(arguments, "RECIPE")]), arguments)


def shard_merge(arguments: argparse.Namespace) -> int:
    """`headwater shard merge`."""
    from data.parts import merge

    summary = merge(arguments.out)
    if not summary["parts"]:
        return _tell(summary, f"{arguments.out} is joined already", arguments)
    left = f", {summary['unreadable']:,} unreadable left out" if summary["unreadable"] else ""
    text = f"{summary['parts']} parts joined: {summary['samples']:,} samples in {summary['shards']:,} shards{left}"
    return _tell(summary, f"{text}\n{_next_of_shards(arguments, 'RECIPE')}", arguments)


def shard_text(arguments: argparse.Namespace) -> int:
    """`headwater shard text`."""
    from data.text import shard_text

    settings: dict[str, Any] = {
        "vocab_size": arguments.vocab_size,
        "tokenizer": arguments.tokenizer,
        "validation": arguments.validation,
        "document": arguments.document,
        "field": arguments.field,
        "workers": arguments.workers,
    }
    if arguments.part:
        return _shard_text_part(arguments, settings)
    summary = shard_text(arguments.source, arguments.out, overwrite=arguments.overwrite, **settings)
    held = summary["validation"]
    text = (
        f"{summary['tokens']:,} tokens of {summary['documents']:,} documents in {arguments.out} "
        f"({summary['bytes_per_token']:.2f} bytes a token, {summary['vocab_size']:,} token ids)\n"
        + (f"held out: {held['documents']:,} documents in {arguments.out / 'validation'}\n" if held else "")
        + (f"{summary['replaced']:,} undecodable places were replaced\n" if summary["replaced"] else "")
        + f"next: headwater pretrain next_token_small data.train={arguments.out}"
    )
    return _tell(summary, text, arguments)


def _shard_text_part(arguments: argparse.Namespace, settings: dict[str, Any]) -> int:
    from data.errors import UserError
    from data.parts import parse_part
    from data.text_parts import shard_text_part

    if arguments.overwrite:
        raise UserError("--overwrite and --part do not go together: other parts may be at work; remove OUT first")
    summary = shard_text_part(arguments.source, arguments.out, parse_part(arguments.part), **settings)
    if summary["already"]:
        return _tell(summary, f"part {arguments.part} of {arguments.out} is already done", arguments)
    text = f"{summary['tokens']:,} tokens of {summary['documents']:,} documents in part {arguments.part}"
    return _tell(summary, f"{text}\n{_next_of_shards(arguments, 'next_token_small')}", arguments)


def inspect(arguments: argparse.Namespace) -> int:
    """`headwater inspect`: exit status 1 when there are problems."""
    from data.inspect import inspect

    report = inspect(arguments.shards, verify=not arguments.fast)
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number}" for key, number in value.items())
        if name != "problems":
            lines.append(
                f"{name.replace('_', ' '):<18} {value:,}" if isinstance(value, int | float) else f"{name:<18} {value}"
            )
    lines += [f"problem: {problem}" for problem in report["problems"]] or ["no problems found"]
    _tell(report, "\n".join(lines), arguments)
    return 1 if report["problems"] else 0


def pretrain(arguments: argparse.Namespace) -> int:
    """`headwater pretrain`: in this process, or through `accelerate launch` for several."""
    import os

    # Before torch is loaded: it tells at length of a store that has left before us.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from launch.network import nodes_for
    from launch.processes import launch, processes_for

    count = 1 if arguments.dry_run else processes_for(arguments.processes)
    nodes = nodes_for(arguments.nodes, arguments.main_address, arguments.main_port)
    if arguments.dry_run or (count == 1 and nodes is None and not arguments.max_restarts):
        from pretrain.__main__ import run

        return run(arguments)
    from pathlib import Path

    from pretrain.recipe_file import load_recipe

    # Read here as well: one process says what is wrong with a recipe, before others are started.
    output = arguments.output or Path("runs") / load_recipe(arguments.recipe, arguments.settings).name
    words = [arguments.recipe, *arguments.settings, "--resume", arguments.resume, "--output", str(output)]
    return launch(count, words, output, arguments.max_restarts, nodes)


def replay(arguments: argparse.Namespace) -> int:
    """`headwater replay`: exit status 1 where something is not finite."""
    from dataclasses import asdict

    from pretrain.replay import describe, replay

    found = replay(arguments.run, arguments.step, arguments.settings, arguments.start)
    _tell(asdict(found), describe(found), arguments)
    return 0 if math.isfinite(found.loss) and math.isfinite(found.gradient_norm) else 1


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
