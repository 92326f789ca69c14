"""`headwater`: parses first, imports later, so that help and mistakes answer at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch import (
    advise_commands,
    cluster_commands,
    combine_commands,
    commands,
    export_commands,
    plan_commands,
    shard_commands,
    task_commands,
    tuning_commands,
)
from launch.parsers import add_command, add_json


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `headwater` command; returns the exit status (2 for bad input)."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes `key=value` settings only up to the first option; those behind it come out as a rest.
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(settings) < len(rest) or (rest and not hasattr(arguments, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings = arguments.settings + settings
    if not hasattr(arguments, "command"):
        parser.print_help()
        return 0
    from data.errors import UserError

    try:
        check_packages()
        return arguments.command(arguments)
    except UserError as error:
        print(f"headwater: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("headwater: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="headwater",
        description="Self-supervised pre-training over sharded data: pre-train upstream, fine-tune downstream.",
    )
    sub = parser.add_subparsers(title="commands", metavar="COMMAND")
    _quickstart(sub)
    _shard(sub)
    _inspect(sub)
    _pretrain(sub)
    _replay(sub)
    export_commands.add(sub)
    task_commands.add(sub)
    combine_commands.add(sub)
    tuning_commands.add(sub)
    _status(sub)
    _report(sub)
    advise_commands.add(sub)
    plan_commands.add(sub)
    cluster_commands.add(sub)
    return parser


def check_packages() -> None:
    """`data` is a common word: say so at once when another package of that name comes first.

    Raises:
        UserError: naming the package that shadows ours.
    """
    import importlib.util

    from data.errors import UserError

    home = Path(__file__).resolve().parent.parent
    for name in ("data", "pretrain", "finetune"):
        found = importlib.util.find_spec(name)
        origin = Path(found.origin).resolve() if found and found.origin else None
        if origin is None or origin.parent.parent != home:
            raise UserError(f"another package named {name!r} ({origin}) hides headwater's; run from another folder")


def _quickstart(sub: argparse._SubParsersAction) -> None:
    parser = add_command(
        sub, "quickstart", commands.quickstart, "the whole pipeline on embedded data, in minutes, offline"
    )
    parser.add_argument("kind", nargs="?", choices=["images", "text"], default="images")
    parser.add_argument("--output", type=Path, default=Path("quickstart"), help="folder for everything it makes")
    parser.add_argument("--seeds", type=int, default=5, help="draws of the labelled samples (default: 5)")


def _shard(sub: argparse._SubParsersAction) -> None:
    shard = sub.add_parser("shard", help="turn files into tar shards with an index")
    kinds = shard.add_subparsers(title="kinds", metavar="KIND", required=True)
    images = add_command(kinds, "images", shard_commands.shard_images, "a folder of pictures -> shards")
    images.add_argument("source", type=Path, help="folder; the first level below it names the labels")
    images.add_argument("out", type=Path, help="folder to make")
    images.add_argument("--labels", type=Path, metavar="CSV", help="table with the columns file and label")
    images.add_argument("--shard-size", type=int, default=10_000, help="pictures a shard (default: 10000)")
    images.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    images.add_argument("--resize", type=int, metavar="SIDE", help="shrink pictures to this shorter side, in pixels")
    images.add_argument("--quality", type=int, help="encode all as JPEG of this quality (1-95; shrunk ones: 90)")
    images.add_argument("--dedup", action="store_true", help="store only the first of files with the same bytes")
    images.add_argument("--beside", nargs="+", default=[], metavar="EXT", help="store files beside pictures: txt json")
    text = add_command(
        kinds, "text", shard_commands.shard_text, "text, JSONL or parquet files (.gz, .zst too) -> shards of token ids"
    )
    text.add_argument("source", nargs="+", type=Path, help="files and folders")
    text.add_argument("out", type=Path, help="folder to make")
    text.add_argument("--vocab-size", type=int, default=8192, help="of the BPE that is trained (default: 8192)")
    text.add_argument("--tokenizer", help="tokenizer.json, or the word `characters`, instead of training one")
    text.add_argument("--document", choices=["file", "line", "paragraph"], default="file", help="what is a document")
    text.add_argument(
        "--field", default="text", help="JSONL field or parquet column that holds the text (default: text)"
    )
    text.add_argument("--validation", type=float, default=0.005, help="share of documents held out (default: 0.005)")
    text.add_argument("--workers", type=int, metavar="N", help="processes that tokenise (default: one for each core)")
    convert = add_command(
        kinds, "convert", shard_commands.shard_convert, "tars made elsewhere, compressed ones too -> shards"
    )
    convert.add_argument("source", nargs="+", help="tars, folders, patterns; paths or URLs")
    convert.add_argument("out", type=Path, help="folder to make")
    convert.add_argument("--shard-size", type=int, default=10_000, help="pictures a shard (default: 10000)")
    convert.add_argument("--salvage", action="store_true", help="take what can be read of damaged and joined tars")
    convert.add_argument("--last-dot", action="store_true", help="keys end at a name's last dot, not at its first")
    combine_commands.add_corrupt(kinds)
    merge = add_command(kinds, "merge", shard_commands.shard_merge, "join the parts of a dataset that --part wrote")
    merge.add_argument("out", type=Path, help="folder that the parts were written to")
    add_json(merge)
    for parser in (images, text):
        parser.add_argument("--part", metavar="I/N", help="write part I (from 0) of N; then: headwater shard merge OUT")
    for parser in (images, text, convert):
        parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
        add_json(parser)


def _inspect(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "inspect", shard_commands.inspect, "what shards hold, and whether they are whole")
    parser.add_argument("shards", help="folder or glob of shards")
    parser.add_argument("--fast", action="store_true", help="skip the checksums and the search for duplicates")
    add_json(parser)


def _pretrain(sub: argparse._SubParsersAction) -> None:
    parser = add_command(
        sub,
        "pretrain",
        commands.pretrain,
        "train a recipe, resuming where it stopped, and export its encoder",
    )
    from pretrain.__main__ import add_arguments

    add_arguments(parser)
    parser.add_argument(
        "--processes", type=int, default=None, metavar="N", help="processes (default: one for each GPU)"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that run this command (default: 1)")
    parser.add_argument("--main-address", metavar="HOST", help="the machine where several meet, the same on all")
    parser.add_argument("--main-port", type=int, default=29400, metavar="PORT", help="its port (default: 29400)")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="times to start again after a crash or hang (0)"
    )


def _replay(sub: argparse._SubParsersAction) -> None:
    parser = add_command(
        sub, "replay", commands.replay, "one step of a run again: loss, gradient by layer, bad samples"
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("step", type=int, help="as in metrics.jsonl; RUN/bad lists the bad ones")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings to change, e.g. data.train=SHARDS")
    parser.add_argument("--from", dest="start", type=Path, metavar="CHECKPOINT", help="state to start from")
    add_json(parser)


def _status(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "status", commands.status, "how runs are going: progress, speed, time left, health")
    parser.add_argument("runs", nargs="*", type=Path, default=[Path("runs")], help="run folders (default: runs)")
    add_json(parser)


def _report(sub: argparse._SubParsersAction) -> None:
    parser = add_command(sub, "report", commands.report, "one HTML page about a run: curves, pictures, environment")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, metavar="FILE", help="page to write (default: RUN/report.html)")
    parser.add_argument(
        "--no-pictures", action="store_true", help="leave out what the model sees (does not load torch)"
    )


if __name__ == "__main__":
    sys.exit(main())
