"""`headwater shard …` and `headwater inspect`; every heavy import waits until its command runs."""

from __future__ import annotations

import argparse
from typing import Any

from launch.output import tell


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
        return tell(summary, f"part {arguments.part} of {arguments.out} is already done", arguments)
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
    return tell(summary, "\n".join([*lines, _next_of_shards(arguments, "RECIPE")]), arguments)


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
    return tell(asdict(done), "\n".join([*lines, _next_of_shards(arguments, "RECIPE")]), arguments)


def shard_merge(arguments: argparse.Namespace) -> int:
    """`headwater shard merge`."""
    from data.parts import merge

    summary = merge(arguments.out)
    if not summary["parts"]:
        return tell(summary, f"{arguments.out} is joined already", arguments)
    left = f", {summary['unreadable']:,} unreadable left out" if summary["unreadable"] else ""
    text = f"{summary['parts']} parts joined: {summary['samples']:,} samples in {summary['shards']:,} shards{left}"
    return tell(summary, f"{text}\n{_next_of_shards(arguments, 'RECIPE')}", arguments)


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
    return tell(summary, text, arguments)


def _shard_text_part(arguments: argparse.Namespace, settings: dict[str, Any]) -> int:
    from data.errors import UserError
    from data.parts import parse_part
    from data.text_parts import shard_text_part

    if arguments.overwrite:
        raise UserError("--overwrite and --part do not go together: other parts may be at work; remove OUT first")
    summary = shard_text_part(arguments.source, arguments.out, parse_part(arguments.part), **settings)
    if summary["already"]:
        return tell(summary, f"part {arguments.part} of {arguments.out} is already done", arguments)
    text = f"{summary['tokens']:,} tokens of {summary['documents']:,} documents in part {arguments.part}"
    return tell(summary, f"{text}\n{_next_of_shards(arguments, 'next_token_small')}", arguments)


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
    tell(report, "\n".join(lines), arguments)
    return 1 if report["problems"] else 0
